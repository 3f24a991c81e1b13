"""What the votes say: the share of each method, with Wilson intervals, as text, JSON and one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.stats import binomtest

from rl_system.runs.charts import Bar, bar_chart
from rl_system.runs.files import new_folder, write_atomic, write_json
from rl_system.studies.study.votes import Tally

CONFIDENCE = 0.95
ALL = "All data sets"


@dataclass(frozen=True)
class Share:
    """Votes of a method; its share of all votes, with the Wilson interval. None where nobody has voted."""

    votes: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Results:
    """``shares``: data set -> method -> share; with several data sets :data:`ALL` comes last.

    ``participants`` voted at least once, ``complete`` of them on every image.
    """

    methods: tuple[str, ...]
    images: int
    participants: int
    complete: int
    shares: dict[str, dict[str, Share]]


def share(votes: int, total: int) -> Share:
    """Share and Wilson (1927) interval at 95 %, without continuity correction."""
    if total == 0:
        return Share(0, None, None, None)
    interval = binomtest(votes, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(votes, votes / total, float(interval.low), float(interval.high))


def results_of(found: Sequence[Tally], votes_each: Counter[int]) -> Results:
    """Shares from what :func:`rl_system.studies.study.votes.tallies` counted."""
    images = sum(tally.images for tally in found)
    methods = tuple(found[0].votes)
    counts = {tally.data_set: tally.votes for tally in found}
    if len(found) > 1:
        counts[ALL] = {name: sum(tally.votes[name] for tally in found) for name in methods}
    shares = {
        data_set: {name: share(votes[name], sum(votes.values())) for name in methods}
        for data_set, votes in counts.items()
    }
    return Results(methods, images, votes_each.total(), votes_each[images], shares)


def to_text(results: Results) -> str:
    """The table as GitHub markdown."""
    lines = ["| Data set | Method | Votes | Share | 95 % interval |", "|---|---|---:|---:|---:|"]
    for data_set, shares in results.shares.items():
        for name, value in shares.items():
            cells = (data_set.replace("|", r"\|"), name.replace("|", r"\|"), str(value.votes), *_texts(value))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", summary(results)])


def summary(results: Results) -> str:
    """One sentence on who voted."""
    votes = sum(value.votes for value in list(results.shares.values())[-1].values())
    return (
        f"{votes} votes of {_counted(results.participants, 'participant')} on {_counted(results.images, 'image')}; "
        f"{results.complete} voted on every image."
    )


def write_results(output: Path, results: Results) -> None:
    """Write results.json and results.html to ``output``, which must not exist.

    Raises:
        OSError: ``output`` cannot be written; nothing is left behind.
    """
    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    sections = [
        {
            "data_set": data_set,
            "chart": _chart(data_set, shares),
            "rows": [(name, value.votes, *_texts(value)) for name, value in shares.items()],
        }
        for data_set, shares in results.shares.items()
    ]
    page = environment.get_template("results.html.j2").render(sections=sections, summary=summary(results))
    with new_folder(output) as folder:
        write_json(folder / "results.json", _record(results))
        write_atomic(folder / "results.html", page)


def _record(results: Results) -> dict[str, Any]:
    return {"confidence": CONFIDENCE, "interval": "wilson", **asdict(results)}


def _chart(data_set: str, shares: dict[str, Share]) -> str:
    """Empty where nobody has voted."""
    bars = []
    for name, value in shares.items():
        if value.share is None or value.low is None or value.high is None:
            return ""
        bars.append(Bar(name, value.share, value.low, value.high, _texts(value)[0]))
    return bar_chart(bars, f"{data_set}: share of the votes per method", 1 / len(bars))


def _texts(value: Share) -> tuple[str, str]:
    if value.share is None:
        return "–", "–"
    return f"{value.share:.1%}", f"{value.low:.1%}–{value.high:.1%}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
