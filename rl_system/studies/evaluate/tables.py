"""The paper's table: a row per metric, a column per method, data sets below each other; best and second best marked."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from rl_system.studies.evaluate.published import PUBLISHED
from rl_system.studies.evaluate.scoring import Scores
from vlcot.metrics import METRICS

WITHOUT_REFERENCES = ("NIQE", "MANIQA", "MUSIQ", "CLIPIQA", "TOPIQ")  # the paper's rows, in its order
NONE, NO_WEIGHTS = "–", "no weights"
HOW_TO_GIVE = "Put them in a folder and give it with --weights DIR."
CALLS = (
    "PSNR and SSIM on Y of YCbCr (16..235), no border cropped; LPIPS of AlexNet; FID of clean-fid; MANIQA of PIPAL; "
    "MUSIQ and TOPIQ of KonIQ; all by pyiqa 0.1.16."
)


class Mark(Enum):
    """How a value stands in its row."""

    PLAIN = 0
    BEST = 1
    SECOND = 2


Cell = tuple[str, Mark]


@dataclass(frozen=True)
class Row:
    """One metric of one data set; a cell per column."""

    data_set: str
    metric: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """``columns`` are method names and whether they were published rather than measured."""

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def rows_of(has_references: bool) -> tuple[str, ...]:
    """The paper's metrics of a data set with or without references, in its order."""
    return tuple(METRICS) if has_references else WITHOUT_REFERENCES


def build_table(
    scores: Sequence[Scores], rows: Mapping[str, Sequence[str]], missing: Mapping[str, Sequence[str]]
) -> Table:
    """Published columns first, then the measured ones in the order given.

    Args:
        scores: of every method on every data set.
        rows: data set -> the metrics to show, computed or not.
        missing: metric -> the weight files it lacks.
    """
    published = dict.fromkeys(m for d in rows if d in PUBLISHED for m in PUBLISHED[d].values)
    measured = dict.fromkeys(score.method for score in scores)
    columns = (*((name, True) for name in published), *((name, False) for name in measured))
    means = {(score.data_set, score.method): score.means for score in scores}

    def text(data_set: str, metric: str, method: str, is_published: bool) -> str:
        if is_published:
            values = PUBLISHED[data_set].values if data_set in PUBLISHED else {}
            return values.get(method, {}).get(metric, NONE)
        if metric in missing:
            return NO_WEIGHTS
        return f"{means[data_set, method][metric]:.{METRICS[metric].decimals}f}"

    def marked(data_set: str, metric: str) -> tuple[Cell, ...]:
        texts = [text(data_set, metric, *column) for column in columns]
        split = 0 if _same_test(data_set, scores) else len(published)
        lower = METRICS[metric].lower_is_better
        return (*_marked(lower, texts[:split]), *_marked(lower, texts[split:]))

    body = tuple(Row(d, metric, marked(d, metric)) for d, metrics in rows.items() for metric in metrics)
    return Table(columns, body, _notes(scores, rows, missing))


def _images(data_set: str, scores: Sequence[Scores]) -> int:
    return next(len(score.images) for score in scores if score.data_set == data_set)


def _same_test(data_set: str, scores: Sequence[Scores]) -> bool:
    return data_set not in PUBLISHED or PUBLISHED[data_set].images == _images(data_set, scores)


def _marked(lower_is_better: bool, texts: Sequence[str]) -> tuple[Cell, ...]:
    """Equal values share a mark; a value alone has none."""
    ranked = sorted({float(t) for t in texts if t not in (NONE, NO_WEIGHTS)}, reverse=not lower_is_better)
    marks = dict(zip(ranked, (Mark.BEST, Mark.SECOND), strict=False)) if len(ranked) > 1 else {}
    return tuple((t, Mark.PLAIN if t in (NONE, NO_WEIGHTS) else marks.get(float(t), Mark.PLAIN)) for t in texts)


def _notes(
    scores: Sequence[Scores], rows: Mapping[str, Sequence[str]], missing: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    notes = []
    for data_set in rows:
        note = f"{data_set}: {_images(data_set, scores)} images"
        if not _same_test(data_set, scores):
            note += (
                f"; the published figures are over {PUBLISHED[data_set].images}: another test, so best is marked apart"
            )
        notes.append(note + ".")
    notes += [
        f"{metric} was not computed: {' and '.join(files)} missing. {HOW_TO_GIVE}" for metric, files in missing.items()
    ]
    sources = dict.fromkeys(source for d in rows if d in PUBLISHED for source in PUBLISHED[d].sources)
    notes += [f"† published, not measured here. {source}." for source in sources]
    return (*notes, CALLS)


def to_markdown(table: Table) -> str:
    """A GitHub table: best bold, second best underlined."""
    styles = {Mark.PLAIN: "{}", Mark.BEST: "**{}**", Mark.SECOND: "<u>{}</u>"}
    lines = ["| Data set | Metric | " + " | ".join(_heads(table, _markdown)) + " |"]
    lines.append("|---|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        cells = " | ".join(styles[mark].format(text) for text, mark in row.cells)
        lines.append(f"| {_markdown(row.data_set)} | {row.metric} {_arrow(row)} | {cells} |")
    notes = "\n".join(f"- {_markdown(note)}" for note in table.notes)
    return "\n".join(lines) + f"\n\nBest **bold**, second best <u>underlined</u>.\n\n{notes}\n"


def to_latex(table: Table) -> str:
    """A ``tabular`` with booktabs rules; notes as comments."""
    styles = {Mark.PLAIN: "{}", Mark.BEST: r"\textbf{{{}}}", Mark.SECOND: r"\underline{{{}}}"}
    lines = [f"% {note}" for note in table.notes]
    lines += [r"\begin{tabular}{ll" + "r" * len(table.columns) + "}", r"\toprule"]
    lines.append(" & ".join(["Data set", "Metric", *_heads(table, _latex, r"$^\dagger$")]) + r" \\")
    previous = None
    for row in table.rows:
        if row.data_set != previous:
            lines.append(r"\midrule")
        name = "" if row.data_set == previous else _latex(row.data_set)
        arrow = r"$\downarrow$" if METRICS[row.metric].lower_is_better else r"$\uparrow$"
        cells = [styles[mark].format(text.replace(NONE, "--")) for text, mark in row.cells]
        lines.append(" & ".join([name, f"{row.metric} {arrow}", *cells]) + r" \\")
        previous = row.data_set
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_html(table: Table) -> str:
    """One page that needs nothing else."""
    styles = {Mark.PLAIN: "{}", Mark.BEST: "<b>{}</b>", Mark.SECOND: "<u>{}</u>"}
    heads = "".join(f"<th>{head}</th>" for head in ["Data set", "Metric", *_heads(table, html.escape)])
    lines = []
    for row in table.rows:
        cells = "".join(f"<td>{styles[mark].format(text)}</td>" for text, mark in row.cells)
        lines.append(f"<tr><th>{html.escape(row.data_set)}</th><th>{row.metric} {_arrow(row)}</th>{cells}</tr>")
    notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Evaluation</title>\n'
        f"<style>{STYLE}</style>\n"
        f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n"
        f"<p>Best <b>bold</b>, second best <u>underlined</u>.</p>\n<ul>\n{notes}\n</ul>\n</html>\n"
    )


STYLE = (
    'body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; margin: 32px; color: #22282d; } '
    "table { border-collapse: collapse; font-variant-numeric: tabular-nums; } "
    "th, td { padding: 4px 12px; border-bottom: 1px solid #e1e5e8; text-align: right; white-space: nowrap; } "
    "th { font-weight: 500; } th:first-child, th:nth-child(2) { text-align: left; } "
    "li { font-size: 13px; color: #66707a; }"
)


def _heads(table: Table, escape: Callable[[str], str], dagger: str = "†") -> list[str]:
    return [escape(name) + (dagger if is_published else "") for name, is_published in table.columns]


def _arrow(row: Row) -> str:
    return "↓" if METRICS[row.metric].lower_is_better else "↑"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda m: special.get(m[0], "\\" + m[0]), text)
