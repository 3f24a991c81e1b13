"""What a cold start is doing now, for ``rl-system status``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rl_system.runs.directory import RunDirectory
from rl_system.runs.live import EVERY_S, LiveState, Process, write_live
from rl_system.runs.progress import Progress

TRAINING, SAMPLER_STARTS, SAMPLING = "training", "starting a rollout actor", "sampling held-out chains"
"""Stages; before the first of them the learner starts."""


def live_state(progress: Progress) -> LiveState:
    """The learner and, once it is done, the actor that samples, by the stage that ``progress`` shows."""
    stage, done, total = progress.now
    if stage == TRAINING:
        doing = "writes the policy" if done == total else f"step {done + 1}"
        learner = Process("learner", "trains", doing, done)
        return LiveState(stage, done, total, done, total or 0, [learner])
    if stage == SAMPLER_STARTS:
        return LiveState(stage, processes=[Process("learner", "done"), Process("rollout 0", "starts")])
    if stage == SAMPLING:
        rollout = Process("rollout 0", "done" if done == total else "samples", f"{done} of {total} chains")
        return LiveState(stage, done, total, processes=[Process("learner", "done"), rollout])
    return LiveState(stage, processes=[Process("learner", "starts")])


@contextmanager
def live_file(run: RunDirectory, progress: Progress) -> Iterator[None]:
    """Replace ``live.json`` once a second from a thread of its own until the block ends; then a last time."""
    ended = threading.Event()

    def keep_writing() -> None:
        while not ended.wait(EVERY_S):
            write_live(run, live_state(progress))

    thread = threading.Thread(target=keep_writing, name="live.json", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write_live(run, live_state(progress))
