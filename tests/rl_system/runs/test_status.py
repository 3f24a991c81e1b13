"""``rl-system status``: what it says of a run in every state."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from io import StringIO
from types import SimpleNamespace

import pytest
from ray._private.ray_logging import setup_logger
from rich.console import Console

from rl_system.commands.main import main
from rl_system.coordination.coordinator import Moment
from rl_system.lookout import Lookout
from rl_system.runs import attempt
from rl_system.runs.directory import RunDirectory, RunStopped
from rl_system.runs.live import LiveState, Process, keep_writing, read_live, write_live
from rl_system.runs.logs import driver_log
from rl_system.runs.progress import Progress
from rl_system.runs.sinks import open_sinks
from rl_system.runs.status import duration, status_view

pytestmark = pytest.mark.unit
DONE = r"done \d+ s ago"


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path, "toy", "seed: 0\n")


def shown(run: RunDirectory, after_s: float = 0.0) -> str:
    out = StringIO()
    Console(file=out, width=160).print(status_view(run, time.time() + after_s))
    return out.getvalue()


def test_a_run_that_trains_shows_processes_queue_versions_and_the_last_step(run):
    sink = open_sinks(run)
    sink.log(12, {"reward/total": 2.0125, "grpo/kl": 0.031, "failures/rate": 0.25})
    sink.close()
    processes = [Process("rollout 0", "serves", "4 prompts", 12), Process("rollout 1", "down", "0 prompts")]
    groups = {"generating": 4, "ready": 2}
    write_live(run, LiveState("training", 12, 40, 12, 40, processes, groups, "4 generating (oldest for 9 s)", 3.0))
    text = shown(run)
    assert re.search(r"running for \d+ s", text) and "stage: training 12/40" in text and "killed" not in text
    assert "rollout 0 │ serves │ 4 prompts │ v12" in text and "rollout 1 │ down" in text
    assert "groups: 4 generating, 2 ready; waits: 4 generating (oldest for 9 s); last progress 3 s ago" in text
    assert "step 12: reward 2.013, KL 0.0310, failed rewards 25.0%" in text
    assert "has said nothing for 2 min 0 s: it may have been killed" in shown(run, after_s=120)


def test_a_run_that_ended_says_how_and_shows_no_process(run):
    write_live(run, LiveState("training", processes=[Process("learner", "trains", "step 3", 2)]))
    run.set_status("failed", "StalledError: nothing moves")
    text = shown(run)
    assert re.search(r"failed \d+ s ago: StalledError: nothing moves", text) and "learner" not in text


def test_the_command_answers_for_a_run_and_refuses_what_is_none(run, tmp_path, capsys):
    run.set_status("done")
    assert main(["status", str(run.path)]) == 0 and re.search(DONE, capsys.readouterr().out)
    assert main(["status", str(run.path), "--watch"]) == 0 and re.search(DONE, capsys.readouterr().out)
    assert main(["status", str(tmp_path)]) == 2 and "is not the directory of a run" in capsys.readouterr().err


def test_watching_looks_again_until_the_run_ends(run, monkeypatch, capsys):
    looks = []
    monkeypatch.setattr("time.sleep", lambda seconds: looks.append(seconds) or run.set_status("done"))
    assert main(["status", str(run.path), "--watch"]) == 0
    assert looks == [2.0] and re.search(DONE, capsys.readouterr().out)


def test_the_state_is_written_every_second_and_a_last_time(run):
    said = iter(range(100))

    async def for_a_moment():
        task = asyncio.create_task(keep_writing(run, lambda: LiveState("training", step=next(said))))
        await asyncio.sleep(0.05)
        first = read_live(run)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return first

    assert asyncio.run(for_a_moment()).step == 0
    assert read_live(run).step == 1


def test_the_lookout_shows_what_is_up_and_hands_the_figures_on():
    progress, figures = Progress(Console(file=StringIO())), {}
    lookout = Lookout(progress, steps=40)
    assert lookout.state().processes == [] and lookout.state().stage == "starting"
    progress.stage("training", 3, 40)
    ready: list[dict[str, str]] = []
    lookout.pool = SimpleNamespace(load=lambda: {0: (True, 4), 1: (False, 0)}, ready_info=lambda: ready)
    assert lookout.state().processes == [Process("rollout 0", "starts"), Process("rollout 1", "starts")]
    ready.append({"vllm": "0.32"})
    lookout.requests = {"qwen_vl": SimpleNamespace(count=7, failures=2, mean_seconds=0.5)}
    lookout.moment = lambda: Moment(3, True, {"ready": 5}, "5 ready", 2.5, ("qwen_vl",))
    lookout.sink = SimpleNamespace(show=figures.update)
    state = lookout.state()
    assert figures["rewards/left_alone"] == 1
    assert (state.stage, state.done, state.total, state.step) == ("training", 3, 40, 3)
    assert state.processes == [
        Process("rollout 0", "serves", "4 prompts", 3),
        Process("rollout 1", "down", "0 prompts"),
        Process("qwen_vl", "left alone", "7 requests, 2 failed, 0.50 s each"),
        Process("learner", "trains", "step 4", 3),
    ]
    lookout.moment = lambda: Moment(40, False, {"ready": 5}, "5 ready", 2.5, ())
    assert lookout.state().processes[-2:] == [
        Process("qwen_vl", "answers", "7 requests, 2 failed, 0.50 s each"),
        Process("learner", "done", "", 40),
    ]
    assert figures.pop("rewards/left_alone") == 0
    assert figures == {"groups/ready": 5, "progress/quiet_s": 2.5, "rollout/actors_down": 1}


def test_the_log_names_run_step_and_group_and_keeps_the_traceback(run):
    with pytest.raises(ValueError), driver_log(run):
        logging.getLogger("rl_system.training").info("scored %d", 3, extra={"group_id": "g-1", "step": 2})
        logging.getLogger("elsewhere").error("not ours")
        setup_logger(logging.INFO, "%(message)s")  # as ray.init does, to all handlers that it finds
        logging.getLogger("ray._private.worker").warning("of Ray")
        logging.getLogger("ray._private.worker").info("Started a local Ray instance.")
        raise ValueError("broken")
    with pytest.raises(RunStopped), driver_log(run):
        raise RunStopped("stopped after step 2")
    first, other, error, stop = (json.loads(line) for line in (run.logs / "driver.jsonl").read_text().splitlines())
    assert first["time"].endswith("+00:00")
    del first["time"]
    assert first == {
        "level": "INFO",
        "logger": "rl_system.training",
        "run": "toy",
        "message": "scored 3",
        "step": 2,
        "group_id": "g-1",
    }
    assert (other["logger"], other["message"]) == ("ray._private.worker", "of Ray")
    assert error["level"] == "ERROR" and "test_status.py" in error["exception"] and "broken" in error["message"]
    assert stop["level"] == "INFO"


def test_the_job_is_read_from_what_ray_leaves_in_the_environment():
    left = {"metadata": {"job_submission_id": "raysubmit_1", "job_name": "raysubmit_1", "who": "me"}}
    assert attempt._job({attempt.JOB_CONFIG: json.dumps(left)}) == ("raysubmit_1", {"who": "me"})
    assert attempt._job({}) == ("", {})


def test_durations_are_said_as_people_say_them():
    assert [duration(s) for s in (7.4, 192, 7500)] == ["7 s", "3 min 12 s", "2 h 5 min"]
