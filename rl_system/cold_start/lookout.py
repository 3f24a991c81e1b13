"""What a cold start is doing now, for ``rl-system status``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rl_system.runs.directory import RunDirectory
from rl_system.runs.live import EVERY_S, LiveState, Process, write_live
from rl_system.runs.progress import Progress


class Lookout:
    """Sees the two parts of a cold start; the attributes are set by the run.

    Args:
        progress: knows the stage.
        steps: to train.

    Attributes:
        step: trained; None until the learner is up.
        rollout: state of the actor that samples the held-out chains; empty before there is one.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self.step: int | None = None
        self.rollout = ""

    def state(self) -> LiveState:
        """Now."""
        stage, done, total = self._progress.now
        rows = [self._learner()]
        if self.rollout:
            rows.append(Process("rollout 0", self.rollout))
        return LiveState(stage, done, total, self.step or 0, self._steps, rows)

    def _learner(self) -> Process:
        if self.step is None:
            return Process("learner", "starts")
        if self.step >= self._steps or self.rollout:
            return Process("learner", "done", "", self.step)
        return Process("learner", "trains", f"step {self.step + 1}", self.step)

    @contextmanager
    def written(self, run: RunDirectory) -> Iterator[None]:
        """Replace ``live.json`` once a second from a thread of its own until the block ends; then a last time."""
        ended = threading.Event()

        def keep_writing() -> None:
            while not ended.wait(EVERY_S):
                write_live(run, self.state())

        thread = threading.Thread(target=keep_writing, name="live.json", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write_live(run, self.state())
