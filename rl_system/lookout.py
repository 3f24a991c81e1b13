"""Puts together what a training run is doing now."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from actors.pool import RolloutPool
from reward_servers.client import ServerStats
from rl_system.coordination.coordinator import Moment
from rl_system.runs.live import LiveState, Process
from rl_system.runs.progress import Progress
from rl_system.runs.sinks import PrometheusSink


class Lookout:
    """Sees the parts of a run as they come up; the attributes are set by the run.

    Args:
        progress: knows the stage.
        steps: to train.

    Attributes:
        pool: rollout actors, once they are created.
        requests: of the reward servers so far, by server.
        moment: where the coordinator stands, while there is one.
        sink: gets the live metrics.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self.pool: RolloutPool | None = None
        self.requests: Mapping[str, ServerStats] = {}
        self.moment: Callable[[], Moment] | None = None
        self.sink: PrometheusSink | None = None

    def state(self) -> LiveState:
        """Now; its figures go to the Prometheus endpoint too."""
        stage, done, total = self._progress.now
        load = self.pool.load() if self.pool is not None else {}
        moment = self.moment() if self.moment is not None else None
        rows = self._actors(load, moment.step if moment else None)
        left_alone = moment.left_alone if moment else ()
        rows += [
            Process(server, "left alone" if server in left_alone else "answers", _said(stats))
            for server, stats in self.requests.items()
        ]
        if moment is None:
            return LiveState(stage, done, total, steps=self._steps, processes=rows)
        rows.append(_learner(moment, self._steps))
        if self.sink is not None:
            self.sink.show(
                {
                    **{f"groups/{state}": count for state, count in moment.groups.items()},
                    "progress/quiet_s": moment.quiet_s,
                    "rollout/actors_down": sum(not serves for serves, _ in load.values()),
                    "rewards/left_alone": len(left_alone),
                }
            )
        return LiveState(
            stage, done, total, moment.step, self._steps, rows, moment.groups, moment.waits, moment.quiet_s
        )

    def _actors(self, load: Mapping[int, tuple[bool, int]], version: int | None) -> list[Process]:
        if self.pool is None or not self.pool.ready_info():
            return [Process(f"rollout {i}", "starts") for i in load]
        return [
            Process(f"rollout {i}", "serves" if serves else "down", f"{prompts} prompts", version if serves else None)
            for i, (serves, prompts) in load.items()
        ]


def _learner(moment: Moment, steps: int) -> Process:
    step = moment.step + 1
    if moment.step >= steps:
        return Process("learner", "done", "", moment.step)
    if moment.training:
        return Process("learner", "trains", f"step {step}", moment.step)
    return Process("learner", "waits", f"for the batch of step {step}", moment.step)


def _said(stats: ServerStats) -> str:
    mean = stats.mean_seconds
    return f"{stats.count} requests, {stats.failures} failed" + (f", {mean:.2f} s each" if mean is not None else "")
