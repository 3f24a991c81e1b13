"""The evaluation's table, letter by letter."""

from __future__ import annotations

import pytest

from rl_system.studies.evaluate import tables
from rl_system.studies.evaluate.published import PUBLISHED, Published
from rl_system.studies.evaluate.scoring import Scores
from rl_system.studies.evaluate.tables import Mark
from vlcot.metrics import METRICS

pytestmark = pytest.mark.unit
FILES = {"LPIPS": ["a_1.pth", "b.pth"]}
NOTE = "LPIPS was not computed: {} and b.pth missing. Put them in a folder and give it with --weights DIR."


def scores(method: str, psnr: float, niqe: float, data_set: str = "Set", images: int = 2) -> Scores:
    return Scores(data_set, method, {str(i): {} for i in range(images)}, {"PSNR": psnr, "NIQE": niqe})


@pytest.fixture
def table(monkeypatch):
    theirs = {"PURE": {"PSNR": "22.83", "NIQE": "5.81"}, "ResShift": {"PSNR": "26.31"}}
    monkeypatch.setitem(PUBLISHED, "Set", Published(2, theirs, ("A paper",)))
    measured = [scores("our_best", 26.3051, 5.8049), scores("b|c", 27, 4)]
    return tables.build_table(measured, {"Set": ["PSNR", "LPIPS", "NIQE"]}, FILES)


def test_markdown(table):
    escaped = NOTE.format("a\\_1.pth")
    assert tables.to_markdown(table) == (
        "| Data set | Metric | PURE† | ResShift† | our\\_best | b\\|c |\n"
        "|---|---|---:|---:|---:|---:|\n"
        "| Set | PSNR ↑ | 22.83 | <u>26.31</u> | <u>26.31</u> | **27.00** |\n"
        "| Set | LPIPS ↓ | – | – | no weights | no weights |\n"
        "| Set | NIQE ↓ | 5.81 | – | <u>5.8049</u> | **4.0000** |\n"
        "\nBest **bold**, second best <u>underlined</u>.\n\n"
        "- Set: 2 images.\n"
        f"- {escaped}\n"
        "- † published, not measured here. A paper.\n"
        f"- {tables.CALLS}\n"
    )


def test_latex(table):
    assert tables.to_latex(table) == (
        "% Set: 2 images.\n"
        f"% {NOTE.format('a_1.pth')}\n"
        "% † published, not measured here. A paper.\n"
        f"% {tables.CALLS}\n"
        "\\begin{tabular}{llrrrr}\n"
        "\\toprule\n"
        "Data set & Metric & PURE$^\\dagger$ & ResShift$^\\dagger$ & our\\_best & b|c \\\\\n"
        "\\midrule\n"
        "Set & PSNR $\\uparrow$ & 22.83 & \\underline{26.31} & \\underline{26.31} & \\textbf{27.00} \\\\\n"
        " & LPIPS $\\downarrow$ & -- & -- & no weights & no weights \\\\\n"
        " & NIQE $\\downarrow$ & 5.81 & -- & \\underline{5.8049} & \\textbf{4.0000} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_html(table):
    page = tables.to_html(table)
    assert (
        "<thead><tr><th>Data set</th><th>Metric</th><th>PURE†</th><th>ResShift†</th><th>our_best</th><th>b|c</th>"
        in page
    )
    assert (
        "<tr><th>Set</th><th>PSNR ↑</th><td>22.83</td><td><u>26.31</u></td><td><u>26.31</u></td>"
        "<td><b>27.00</b></td></tr>\n"
        "<tr><th>Set</th><th>LPIPS ↓</th><td>–</td><td>–</td><td>no weights</td><td>no weights</td></tr>\n"
    ) in page
    assert f"<li>{NOTE.format('a_1.pth')}</li>" in page


def test_html_and_latex_escape_names():
    table = tables.build_table([scores("<b>&50%{x}", 1, 2)], {"Set": ["PSNR"]}, {})
    assert "<th>&lt;b&gt;&amp;50%{x}</th>" in tables.to_html(table)
    assert r"& <b>\&50\%\{x\} \\" in tables.to_latex(table)


def test_a_value_alone_has_no_mark_and_other_tests_are_ranked_apart():
    table = tables.build_table(
        [scores("ours", 30, 3, "RealSR", images=40)], {"RealSR": ["PSNR", "TOPIQ", "NIQE"]}, {"TOPIQ": []}
    )
    marked = {
        row.metric: {c[0]: mark for c, (_, mark) in zip(table.columns, row.cells, strict=True)} for row in table.rows
    }
    assert marked["PSNR"]["ours"] is Mark.PLAIN
    assert marked["PSNR"]["ResShift"] is Mark.BEST and marked["PSNR"]["SinSR"] is Mark.SECOND
    assert marked["NIQE"]["RealSR-R1"] is Mark.BEST
    assert marked["NIQE"]["SeeSR"] is marked["NIQE"]["PASD"] is Mark.SECOND
    assert set(marked["TOPIQ"].values()) == {Mark.PLAIN}
    assert table.notes[0] == (
        "RealSR: 40 images; the published figures are over 100: another test, so best is marked apart."
    )


def test_over_the_same_images_all_columns_are_ranked_together():
    table = tables.build_table([scores("ours", 30, 3, "RealSR", images=100)], {"RealSR": ["PSNR"]}, {})
    marks = {column[0]: mark for column, (_, mark) in zip(table.columns, table.rows[0].cells, strict=True)}
    assert marks["ours"] is Mark.BEST and marks["ResShift"] is Mark.SECOND and marks["SinSR"] is Mark.PLAIN


def test_published_figures_are_numbers_of_our_metrics():
    for published in PUBLISHED.values():
        assert published.sources
        for values in published.values.values():
            assert set(values) <= set(METRICS) and all(float(value) > 0 for value in values.values())


def test_published_osediff_is_what_its_own_log_says():
    """The last lines of OSEDiff's metric logs (docs: evaluate); MANIQA drifted after its paper."""
    logs = {
        "RealSR": "PSNR 25.1511 SSIM 0.7341 LPIPS 0.2921 DISTS 0.2128 CLIPIQA 0.6693 NIQE 5.6476 "
        "MUSIQ 69.0896 FID 123.493817",
        "DRealSR": "PSNR 27.9243 SSIM 0.7835 LPIPS 0.2968 DISTS 0.2165 CLIPIQA 0.6963 NIQE 6.4902 "
        "MUSIQ 64.6537 MANIQA 0.5895 FID 135.296586",
    }
    for data_set, line in logs.items():
        words = line.split()
        for metric, value in zip(words[::2], words[1::2], strict=True):
            printed = PUBLISHED[data_set].values["OSEDiff"][metric]
            decimals = len(printed.partition(".")[2])
            assert printed == f"{float(value):.{decimals}f}", (data_set, metric)
