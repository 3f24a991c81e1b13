"""Runs side by side."""

from __future__ import annotations

import re

import pytest

from rl_system.commands.main import main
from rl_system.runs.comparison import build_comparison
from rl_system.runs.directory import RunDirectory
from tests.rl_system.runs.test_report import Page, synthetic_run

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    finished = synthetic_run(root, steps=8, groups=2)
    fresh = RunDirectory.create(root, "fresh", "name: fresh\nseed: 4\nlearner:\n  steps: 30\n")
    return finished, fresh


def test_results_settings_and_curves_stand_side_by_side(runs, tmp_path):
    html = build_comparison(runs, tmp_path / "compare.html").read_text()
    page = Page(html)
    text = re.sub(r"\s+", " ", page.text)
    assert page.open == [] and not re.search(r"url\(|@import|https?://|<script", html)
    assert "2 runs side by side" in text
    assert re.search(r"state done running", text)
    assert re.search(r"total reward 1\.500 → 1\.856 \+0\.356 \(\+\d\.\d{3} to \+\d\.\d{3}\) –", text)
    assert re.search(r"seed 3 4 ", text) and "learner.steps" not in text  # 30 in both
    labels = page.attributes("aria-label")
    assert {"total", "KL to the reference", "staleness (versions): staleness/max"} <= set(labels)
    assert "The same photographs" not in text  # the other run has none yet


def test_photographs_of_all_runs_are_shown_beside_each_other(runs, tmp_path):
    other = synthetic_run(tmp_path / "other", steps=2, groups=1)
    page = Page(build_comparison([runs[0], other], tmp_path / "compare.html").read_text())
    assert len(page.attributes("src")) == 8 * 4 - 2  # LR, ground truth, two finals; prompt 1 has no final image
    assert str(other.path) in page.text and "Settings that differ None." in re.sub(r"\s+", " ", page.text)


def test_the_command_writes_beside_the_first_run_and_refuses_the_rest(runs, capsys):
    finished, fresh = (str(run.path) for run in runs)
    assert main(["report", finished, fresh]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0].path.parent / "compare.html")
    for wrong, said in (
        ([finished, finished], "named twice"),
        ([finished, "nowhere"], "is not the directory of a run"),
        ([finished, "--output", "x.html"], "is for several runs"),
    ):
        assert main(["report", *wrong]) == 2
        assert said in capsys.readouterr().err
