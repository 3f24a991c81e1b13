"""The report of a synthetic run with real photographs, read the way a browser would."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rl_system.commands.main import main
from rl_system.runs import report
from rl_system.runs.charts import Line, line_chart, moving_mean
from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import write_evaluation
from rl_system.runs.groups import GroupStore
from rl_system.runs.report import build_report
from rl_system.runs.sinks import open_sinks
from rl_system.runs.summary import build_summary, write_summary
from rl_system.runs.timeline import TimelineEvent, TimelineWriter
from tests.rl_system.runs.synthetic import HOSTILE, evaluated, scored_group
from vlcot.rewards import COMPONENTS

pytestmark = pytest.mark.unit

_ENGINES = {"rollout": [{"actor": "actor-0", "vllm": "0.32.0"}], "learner": {"deepspeed": "0.19.8", "ray": "2.60.0"}}
_VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with attributes, the visible text, and whether every tag was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def synthetic_run(root: Path, steps: int = 30, side: int = 64, groups: int = 8, group_size: int = 4) -> RunDirectory:
    """A finished run with everything in it, as the training command leaves it."""
    run = RunDirectory.create(root, "synthetic", "name: synthetic\nseed: 3\nlearner:\n  steps: 30\n")
    rng = np.random.default_rng(0)
    sink = open_sinks(run)
    timeline = TimelineWriter(run.timeline)
    origin = 1_750_000_000.0
    for step in range(1, steps + 1):
        rise, noise = 1 - math.exp(-step / 12), rng.normal(0, 0.04, 12)
        metrics = {f"reward/{n}": 0.4 + 0.3 * rise + e for n, e in zip(COMPONENTS, noise, strict=False)}
        metrics |= {
            "reward/total": sum(metrics.values()),
            **{"grpo/kl": 0.02 * rise + abs(noise[4]) / 20, "grpo/loss": noise[5], "grpo/grad_norm": 1 + noise[6]},
            **{"grpo/clip_fraction": 0.1 + noise[7], "grpo/ratio_mean": 1 + noise[8] / 10, "grpo/entropy": 3 - rise},
            **{"staleness/max": float(step > 1), "staleness/mean": 0.5 * (step > 1), "reward_hidden": 0.9 + noise[9]},
            **{"idle/actors": 0.1 + abs(noise[9]), "idle/learner": 0.3 + noise[10]},
            **{"time/step": 8 + noise[0], "time/generate": 6 + noise[1], "time/reward": 1.0, "time/train": 4.0},
            **{"throughput/sampled_tokens_per_s": 900 * (1 + noise[2]), "throughput/images_per_s": 6 * (1 + noise[3])},
            **{f"failures/{n}": 0.0 for n in COMPONENTS},
        }
        if step == 4:
            metrics["grpo/kl"] = math.nan
        sink.log(step, metrics)
        begin = origin + 8 * step
        for i in range(4):
            generated = begin + 5 + 1.5 * rng.random()
            timeline.write(TimelineEvent("rollout actor-0", f"group {4 * step + i}", begin + 0.6 * i, generated))
            timeline.write(TimelineEvent("rewards", f"group {4 * step + i}", generated, generated + 1.2))
        timeline.write(TimelineEvent("learner", f"step {step}", begin + 7.5, begin + 11.5))
    sink.close()
    timeline.close()
    store = GroupStore(run.groups, keep=6)
    for i in range(groups):
        failed = 2 if i == 0 else None
        store.offer(scored_group(i, 1.0 + 0.1 * i, samples=group_size, side=side, failed=failed))
    before, after = evaluated(16, 0.0, side), evaluated(16, 0.3, side)
    write_evaluation(run, "before", before, pictures=8)
    write_evaluation(run, "after", after, pictures=8)
    facts = {
        "kl_final": 0.02,
        "steps": steps,
        "groups_trained": 4 * steps,
        "groups_reused": 0,
        "wall_s": 340.0,
        "max_staleness_seen": 1,
    }
    summary = build_summary(before, after, seed=3, engines=_ENGINES, weight_checksum_match=True, **facts)
    write_summary(run, summary)
    run.set_status("done")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = synthetic_run(tmp_path_factory.mktemp("runs"))
    html = build_report(run).read_text()
    return run, html, Page(html)


def test_the_report_is_one_file_without_references_or_scripts(finished):
    _, html, page = finished
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert all(uri.startswith("data:image/") for uri in page.attributes("src"))
    assert page.attributes("href") == [] and not re.search(r"url\(|@import|https?://", html)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_what_the_model_wrote_is_shown_as_text(finished):
    _, html, page = finished
    assert HOSTILE in page.text and "<script" not in html


def test_the_report_shows_gains_curves_pictures_groups_and_the_time_line(finished):
    _, html, page = finished
    text = re.sub(r"\s+", " ", page.text)
    assert "went from 1.500 before training to 1.856 after it: +0.356" in text
    for part in ("Total reward", "PSNR (dB)", "never part of a reward", "vllm: 0.32.0", "seed: 3"):
        assert part in text
    labels = page.attributes("aria-label")
    assert {*COMPONENTS, "total", "KL to the reference", "clip fraction", "staleness (versions)"} <= set(labels)
    assert {"idle share of the time", "time line of all processes"} <= set(labels)
    # 8 strips of LR, bicubic, ground truth and 2 x 3 images, two images less for the prompt without a final one;
    # 6 groups (three best, three worst) of the LR image and 4 x 3 images, one less each
    assert len(page.attributes("src")) == 8 * 9 - 2 + 6 * (1 + 4 * 3 - 1)
    assert "the visual expert did not answer" in text and "no main object was found" in text
    # the learner works 4 s of every step of 8 s; the run lasts from 8 s to 251.5 s after the origin
    assert f"learner {100 * 30 * 4 / 243.5:.0f} %" in text and "all events are in timeline.jsonl" in text
    assert text.count("mean reward") == 6 and "image-rendering: pixelated" in html
    assert len(html) < 6_000_000


def test_the_summary_and_the_table_agree(finished):
    run, _, page = finished
    row = re.search(r"Total reward\s+([\d.]+)\s+([\d.]+)\s+\+([\d.]+)\s+\+([\d.]+) to \+([\d.]+)", page.text)
    summary = json.loads(run.summary.read_text())
    expected = [summary["reward_before"], summary["reward_after"], summary["reward_gain"], *summary["reward_gain_ci95"]]
    assert [float(value) for value in row.groups()] == pytest.approx(expected, abs=6e-4)


def test_pictures_beyond_the_budget_are_left_out_and_said_to_be(tmp_path, monkeypatch):
    assert report._STRIP_BYTES + report._GROUP_BYTES < 5_500_000  # the rest of a report is text
    run = RunDirectory.create(tmp_path, "large", "")
    GroupStore(run.groups, keep=1).offer(scored_group(0, 1.0, samples=4, side=256))
    whole = build_report(run).read_text()
    monkeypatch.setattr(report, "_GROUP_BYTES", 60_000)
    cut = build_report(run).read_text()
    assert "left out" not in whole and "left out" in cut and "data:image/jpeg" in cut
    assert sum(len(uri) for uri in Page(cut).attributes("src")) <= 60_000 < len(whole) - 60_000


def test_a_run_that_has_just_begun_or_failed_has_a_report_too(tmp_path, capsys):
    run = RunDirectory.create(tmp_path, "young", "name: young\n")
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert "have not been evaluated yet" in run.report.read_text()
    write_evaluation(run, "before", evaluated(2, 0.0, 32), pictures=1)
    run.set_status("failed", "<b>the detector</b> did not answer")
    assert main(["report", str(run.path)]) == 0
    html = run.report.read_text()
    assert "is <b>1.500</b> before training" in html and "&lt;b&gt;the detector&lt;/b&gt; did not answer" in html


def test_a_group_that_the_run_replaces_meanwhile_is_left_out(tmp_path):
    run = RunDirectory.create(tmp_path, "toy", "")
    store = GroupStore(run.groups, keep=2)
    for i in range(2):
        store.offer(scored_group(i, 1.0 + i, side=16))
    (run.groups / "000000" / "lr.png").unlink()
    (run.groups / "000001" / "group.json").rename(run.groups / "moved")
    assert "mean reward" not in build_report(run).read_text()


def test_a_directory_that_is_no_run_is_refused_with_exit_code_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_moving_mean_leaves_out_what_is_not_finite():
    points = [(1, 1.0), (2, math.nan), (3, 3.0), (4, 8.0)]
    assert moving_mean(points, 2) == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 5.5)]


def test_a_value_that_is_not_finite_breaks_the_curve():
    svg = line_chart([Line([(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 0.0)], "#000")], "<kl>")
    assert svg.count("<polyline") == 2 and "nan" not in svg and 'aria-label="&lt;kl&gt;"' in svg
    assert "no value yet" in line_chart([Line([(1, math.nan)], "#000")], "kl")
