"""rl-system cold-start: what is refused, which examples a step has, and a whole run that is stopped and goes on."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rl_system.cold_start import settings
from rl_system.cold_start.data import PreparedExamples, held_out_prompts
from rl_system.cold_start.lookout import SAMPLER_STARTS, SAMPLING, TRAINING, live_file, live_state
from rl_system.commands.main import main
from rl_system.data.prepared import PreparedData
from rl_system.data.rows import prepared_splits
from rl_system.preparation import pipeline
from rl_system.preparation import settings as preparation
from rl_system.preparation.shards import ShardWriter
from rl_system.runs.directory import RunDirectory
from rl_system.runs.live import read_live
from rl_system.runs.progress import Progress
from toy.export_photographs import export
from vlcot.policy.family import Family

ROOT = Path(__file__).parents[2]
SMALL = ["learner.ranks=1", "learner.batch_size=4", "evaluation.prompts=2", "learner.checkpoint_every=1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    export(folder, 24, seed=0)
    texts = [f"captions={folder / 'captions.jsonl'}", f"objects={folder / 'captions.jsonl'}"]
    small = ["min_pixels=0", "min_file_kib=0", "sharpen_target=false"]
    config = preparation.load([f"input={folder / 'photographs'}", f"output={folder / 'data'}", *texts, *small])
    job = pipeline.begin(config)
    with job.claim:
        for shard in job.missing:
            ShardWriter(config).write(shard, job.files)
        pipeline.finish(config, job)
    return folder / "data"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "recipe=authors|paper|toy"),
        (["recipe=other"], "not other"),
        (["recipe=toy"], "data=DIR is missing"),
        (["recipe=toy", "data=nowhere"], "no prepared folder"),
        (["recipe=toy", "data=x", "learner.epoch=1"], "did you mean 'learner.epochs'?"),
        (["recipe=toy", "data=x", "learner.epochs=many"], "many"),
        (["recipe=toy", "data=x", "learner.dropout=1"], "learner.dropout=1.0 must lie in [0, 1)"),
        (["recipe=toy", "data=x", "policy.path=nowhere"], "policy.path="),
        (["recipe=paper", "data=x"], "no .safetensors"),
        (["recipe=toy", "data=x", "resume=maybe"], "resume=maybe"),
    ],
)
def test_what_cannot_be_is_refused_at_once_with_one_message(capsys, tmp_path, overrides, said):
    assert main(["cold-start", f"output_dir={tmp_path / 'runs'}", *overrides]) == 2
    out = capsys.readouterr()
    assert said in out.err and len(out.err.strip().splitlines()) == 1 and not out.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.unit
def test_too_few_examples_for_a_step_are_refused(capsys, tmp_path, prepared):
    few = ["recipe=toy", f"data={prepared}", "learner.batch_size=1000", f"output_dir={tmp_path / 'runs'}"]
    assert main(["cold-start", *few]) == 2
    assert "do not fill one batch of 1000" in capsys.readouterr().err


@pytest.mark.unit
def test_an_epoch_has_every_training_example_once_and_no_held_out_one(prepared):
    data = PreparedData(prepared)
    train, out = prepared_splits(data).values()
    assert len(train) + len(out) == len(data) == 24 and len(out) > 0
    source = PreparedExamples(str(prepared), len(train), seed=1, held_out=5)
    source.held_out()
    source = pickle.loads(pickle.dumps(source))
    answers = {data.example(row).answer_ids.tobytes() for row in train}
    epochs = [[e.answer.tobytes() for e in source.examples(step)] for step in (1, 2)]
    assert set(epochs[0]) == set(epochs[1]) == answers and epochs[0] != epochs[1]
    assert [e.answer.tobytes() for e in source.examples(2)] == epochs[1]
    assert not {e.answer.tobytes() for e in source.held_out()} & answers
    halves = PreparedExamples(str(prepared), len(train) // 2, seed=1, held_out=5)
    assert [e.answer.tobytes() for e in halves.examples(1) + halves.examples(2)] == epochs[0][: 2 * (len(train) // 2)]


@pytest.mark.unit
def test_held_out_questions_have_their_own_targets(prepared):
    data = PreparedData(prepared)
    rows = [data.row(row) for row in prepared_splits(data)["heldout"]]
    prompts, targets = zip(*held_out_prompts(str(prepared), 64, 100, seed=0), strict=True)
    assert [p.degradation for p in prompts] == [row["degradation"] for row in rows]
    assert [p.ids.tolist() for p in prompts] == [row["prompt_ids"] for row in rows]
    assert {t.shape for t in targets} == {(64, 64, 3)} and {p.lr_image.shape for p in prompts} == {(16, 16, 3)}


@pytest.mark.unit
def test_the_live_table_names_both_parts_and_what_they_do(tmp_path):
    run = RunDirectory.create(str(tmp_path), "cold", "seed: 0\n", overwrite=False)
    seen = []
    with Progress(Console(file=io.StringIO())) as progress, live_file(run, progress):
        for stage in (
            ("starting the learner",),
            (TRAINING, 2, 3),
            (SAMPLER_STARTS,),
            (SAMPLING, 0, 2),
            (SAMPLING, 2, 2),
        ):
            progress.stage(*stage)
            seen.append([f"{p.name} {p.state} {p.doing}".strip() for p in live_state(progress).processes])
        progress.stage(TRAINING)
        progress.update(5, 5, {}, {})
    assert seen == [
        ["learner starts"],
        ["learner trains step 3"],
        ["learner done", "rollout 0 starts"],
        ["learner done", "rollout 0 samples 0 of 2 chains"],
        ["learner done", "rollout 0 done 2 of 2 chains"],
    ]
    last = read_live(run)
    assert (last.step, last.steps, last.processes[0].doing) == (5, 5, "writes the policy")


@pytest.mark.unit
@pytest.mark.parametrize(("recipe", "last"), [("paper", 0.0), ("authors", 2e-5)])
def test_the_published_recipes_have_their_schedule(tmp_path, monkeypatch, recipe, last):
    (tmp_path / "policy").symlink_to(ROOT / "toy/weights/policy")
    config = settings.load([f"recipe={recipe}", f"policy.path={tmp_path / 'policy'}", "data=x"])
    spec = settings.learner_spec(config, config.policy.path, rows=94_991)
    assert spec.steps == 11_873 and spec.warmup_steps == 59 and spec.groups_per_step == 16
    assert spec.learning_rate_at(59) == 2e-5
    assert spec.learning_rate_at(spec.steps) == pytest.approx(last, abs=1e-9)


def start(tmp_path: Path, prepared: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "rl_system", "cold-start", "recipe=toy", f"data={prepared}", "learner.epochs=1"]
    return subprocess.Popen(
        [*command, *SMALL, f"output_dir={tmp_path}", "name=cold", "resume=auto"],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_a_run_is_stopped_goes_on_and_its_policy_is_one(tmp_path, prepared):
    said = []
    process = start(tmp_path, prepared)
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, "".join(said)[-4000:]
    process = start(tmp_path, prepared)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    run = tmp_path / "cold"
    live = read_live(RunDirectory.open(run))
    assert [(p.name, p.state) for p in live.processes] == [("learner", "done"), ("rollout 0", "done")]
    summary = json.loads((run / "summary.json").read_text())
    assert live.done == live.total == summary["prompts"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, summary["steps"] + 1))
    assert metrics[-1]["loss/total"] < metrics[0]["loss/total"]
    sampled = min(2, len(prepared_splits(PreparedData(prepared))["heldout"]))
    assert np.isfinite(summary["heldout/loss/total"]) and summary["prompts"] == sampled
    assert {"loss/text", "loss/code"} <= metrics[0].keys()
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert len(list((run / "evaluation").glob("*-lr.png"))) == sampled
    policy = Path(summary["policy"])
    assert Family.from_pretrained(policy).layout.full_size == 64 and (policy / "model.safetensors").is_file()
