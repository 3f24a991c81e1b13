"""Costs from run directories, and what the model predicts with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rl_system.commands.main import main
from rl_system.runs.directory import RunDirectory
from rl_system.studies.scaling.calibration import TOY, fit, pipeline_of, simulated
from rl_system.studies.scaling.measured import MeasuredRun, Setting, read_run
from rl_system.studies.scaling.pipeline import steady

pytestmark = pytest.mark.unit

MEASURED = json.loads(Path("benchmarks/results/scaling.json").read_text())["toy"]
CONFIG = {
    "learner": {"groups_per_step": 2, "ranks": 2, "threads": 1, "use_gpu": False},
    "coordination": {"max_staleness": 0},
    "rollout": {"group_size": 2, "max_num_seqs": 16, "actors": 1, "num_gpus": 0},
    "reward": {"grounded_sam": {"replicas": 1}, "qwen_vl": {"replicas": 1}},
}
START = 1_000.0


def _stored(row: dict) -> MeasuredRun:
    return MeasuredRun(**{**row["measured"], "setting": Setting(**row["measured"]["setting"])})


FITTED = _stored(MEASURED["runs"][0])
OTHERS = [(_stored(row), row["delay_s"]) for row in MEASURED["runs"][1:]]


def test_the_stored_runs_are_synchronous_and_asynchronous_and_of_two_batch_sizes():
    settings = [(run.setting.max_staleness, run.setting.groups_per_step, delay > 0) for run, delay in OTHERS]
    assert sorted(settings) == [(0, 4, False), (0, 8, True), (1, 4, False), (1, 8, False), (1, 8, True), (3, 8, False)]
    assert (FITTED.setting.max_staleness, FITTED.setting.groups_per_step) == (0, 8)


@pytest.mark.parametrize(("run", "delay_s"), OTHERS, ids=[run.name for run, _ in OTHERS])
def test_step_times_of_runs_that_were_not_fitted_are_predicted_within_15_percent(run, delay_s):
    costs = fit([FITTED], MEASURED["cores"])
    predicted = simulated(costs, run, MEASURED["cores"], delay_s).step_s
    assert predicted == pytest.approx(run.step_s, rel=0.15)


def test_a_fit_finds_the_costs_that_made_the_runs():
    true = replace(TOY, token_s=0.006, token_each_s=0.0001, step_s=0.9, step_group_s=0.08, expert_each_s=0.06)

    def made(groups: int) -> MeasuredRun:
        run = replace(FITTED, setting=replace(FITTED.setting, groups_per_step=groups))
        seen = simulated(true, run, 2)
        times = {"step_s": seen.step_s, "generation_s": seen.generation_s}
        return replace(run, **times, reward_s=seen.reward_s, train_s=seen.train_s)

    runs = [made(4), made(12)]
    found = fit(runs, 2)
    assert found.step_group_s == pytest.approx(true.step_group_s, rel=0.15)
    assert found.token_s == pytest.approx(true.token_s, rel=0.15)
    other = replace(FITTED.setting, groups_per_step=20, max_staleness=2)
    paces = [steady(pipeline_of(costs, other, FITTED, 2)).step_s for costs in (true, found)]
    assert paces[1] == pytest.approx(paces[0], rel=0.02)


def _write_run(path: Path, steps: int = 6, gap: float = 0.0, config: dict = CONFIG) -> Path:
    """A run in which a step takes 5 s: 2 s to generate, 0.5 s rewards, 2 s to train, 0.25 s push; the first takes 30 s.

    Args:
        gap: seconds for which it was stopped before its fourth step.
    """
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    metrics, events = [], []
    for step in range(1, steps + 1):
        begin = START + (25 + 5 * (step - 1) if step > 1 else 0.0) + (gap if step > 3 else 0.0)
        end = START + 25 + 5 * step + (gap if step > 3 else 0.0)
        metrics.append(
            {
                "step": step,
                "time_s": end,
                "time/step": end - begin,
                "time/train": 2.0,
                "time/push_total": 0.25,
                "time/push_pause": 0.02,
                "time/push_load": 0.05,
                "time/push_resume": 0.03,
                "throughput/tokens_per_s": 4 * 150 / 2.0,
                "batch/samples": 4.0,
            }
        )
        for group in range(2):
            events.append(("rollout rollout-0", f"g{group}", begin, begin + 2.0))
            events.append(("rewards", f"g{group}", begin + 2.0, begin + 2.5))
        events.append(("learner", f"step {step}", end - 2.0, end))
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    names = ("process", "name", "start_s", "end_s")
    lines = [json.dumps(dict(zip(names, event, strict=True))) for event in events]
    (path / "timeline.jsonl").write_text("\n".join(lines) + "\n")
    for number, tokens in enumerate([(140, 160), (150, 150)]):
        folder = path / "groups" / f"{number:06d}"
        folder.mkdir(parents=True)
        record = {"mean_total": 1.0, "samples": [{"tokens": t} for t in tokens]}
        (folder / "group.json").write_text(json.dumps(record))
    return path


def test_a_run_directory_is_measured_from_its_second_step_on(tmp_path):
    run = read_run(RunDirectory.open(_write_run(tmp_path / "toy")))
    assert run.setting == Setting(2, 0, 2, 16, 1, 1, 1, 2, 1)
    assert (run.name, run.steps, run.step_s) == ("toy", 6, 5.0)
    assert run.learner_start_s == pytest.approx(30 - 2 - 0.25)
    assert (run.generation_s, run.reward_s, run.train_s) == pytest.approx((2.0, 0.5, 2.0))
    assert (run.push_s, run.load_s) == pytest.approx((0.25, 0.1))
    assert (run.tokens, run.tokens_std) == pytest.approx((150, 50**0.5))


def test_the_command_fits_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = str(_write_run(tmp_path / "toy"))
    assert (
        main(["simulate", "run", run, "--max-staleness", "0", "2", "--groups-per-step", "2", "6", "--cores", "2"]) == 0
    )
    printed = capsys.readouterr().out
    measured = read_run(RunDirectory.open(run))
    model = simulated(fit([measured], 2), measured, 2)
    assert f"5.00 {model.step_s:.2f}" in printed
    assert model.step_s == pytest.approx(5.0, rel=0.1)
    assert "One groups_per_step was measured" in printed


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"steps": 4}, "at least 5"),
        ({"gap": 60.0}, "step 4 came 65 s after step 3 but took 5 s"),
        ({"config": CONFIG | {"learner": CONFIG["learner"] | {"use_gpu": True}}}, "used GPUs"),
    ],
)
def test_runs_that_say_too_little_are_refused(tmp_path, capsys, written, message):
    run = _write_run(tmp_path / "toy", **written)
    assert main(["simulate", "run", str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["simulate", "run", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert main(["simulate", "run", str(tmp_path), "--max-staleness", "-1"]) == 2
