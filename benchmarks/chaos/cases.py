"""What is killed, when, and how long until the run has recovered."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos import evidence, processes
from benchmarks.chaos.attempts import LOOK_S, TARGET, Attempt, ChaosError, ClusterNode, kill_at_once, kill_process
from benchmarks.chaos.processes import Row
from rl_system.runs.sinks import read_metrics
from rl_system.runs.timeline import TimelineEvent, read_timeline

LAST_KILL_AFTER = TARGET.steps // 2 - 1
"""Steps that are reported before the kill at most: prompts must be left that have not been admitted yet."""
WITHIN_S = 2.5
"""A step of these runs takes about so long; the kill falls somewhere inside one."""
REPLACED_S = 120.0
"""After which a part counts as not replaced."""


@dataclass(frozen=True)
class Part:
    """A process of the run that is killed alone.

    Attributes:
        find: the processes of its kind.
        works: when such a part that was killed at a time has done work again, if it had to show in the time line;
            None: its work is the next learner step.
    """

    find: Callable[[Iterable[Row]], list[Row]]
    works: Callable[[list[TimelineEvent], float], float | None] | None


PARTS = {
    "rollout actor": Part(processes.rollout_actors, evidence.group_generated),
    "rollout vLLM engine": Part(processes.rollout_engines, evidence.group_generated),
    "learner rank": Part(processes.learner_ranks, None),
    "Grounded-SAM replica": Part(processes.replicas("grounded_sam"), evidence.group_scored),
    "Qwen2.5-VL replica": Part(processes.replicas("qwen_vl"), evidence.group_scored),
}
NODE, DRIVER = "coordinator's node", "driver"
NAMES = (*PARTS, NODE, DRIVER)


@dataclass
class Outcome:
    """How a case went.

    Attributes:
        step: last step reported before the kill.
        delay_s: between that report and the kill, as drawn.
        replaced_s: seconds from the kill until a new process of the killed kind was started; None for driver and node.
        works_s: until the first work that was begun after the kill and needs that part was finished.
        recovery_s: until a learner step was reported that no report before the kill had, and after ``works_s``.
        broken: promises that were not kept.
        notes: what else was seen.
    """

    case: str
    step: int
    delay_s: float
    replaced_s: float | None = None
    works_s: float | None = None
    recovery_s: float | None = None
    wall_s: float = 0.0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """Where runs are made, with which seed of training, and the seed of the moments at which things are killed.

    ``temporary`` is for Ray clusters: sockets need a short path.
    """

    folder: Path
    temporary: Path
    train_seed: int
    chaos_seed: int

    def new_run(self, case: str) -> str:
        """Name of a case's run; what an earlier one has left is deleted."""
        name = "".join(letter if letter.isalnum() else "-" for letter in case.lower())
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / f"{name}.log").unlink(missing_ok=True)
        return name

    def moment(self, case: str) -> tuple[random.Random, int, float]:
        """For one case: further random choices, the step after whose report it happens, and how many seconds after."""
        rng = random.Random(f"{self.chaos_seed} {case}")
        return rng, rng.randint(1, LAST_KILL_AFTER), rng.uniform(0, WITHIN_S)


def undisturbed(setting: Setting) -> list[str]:
    """Row ids that a run trains when nothing is killed.

    Raises:
        ChaosError: that run is not as it should be.
    """
    with Attempt(setting.folder, "undisturbed", setting.train_seed) as attempt:
        if code := attempt.end():
            raise ChaosError(f"the undisturbed run ended with {code}: {attempt.last_words()}")
    rows = [row for _, row in evidence.trained_rows(attempt.run, TARGET.steps)]
    if broken := evidence.broken_promises(attempt.run, TARGET, rows):
        raise ChaosError(f"the undisturbed run: {'; '.join(broken)}")
    return rows


def killed_part(name: str, setting: Setting) -> tuple[Outcome, Path]:
    """A run, one process of which is killed; the run itself goes on."""
    part = PARTS[name]
    rng, step, delay_s = setting.moment(name)
    with Attempt(setting.folder, setting.new_run(name), setting.train_seed) as attempt:
        attempt.wait_for_step(step)
        time.sleep(delay_s)
        before = part.find(attempt.all.rows())
        if not before:
            raise ChaosError(f"no {name} among the processes of the run")
        outcome = Outcome(name, attempt.step(), delay_s)
        killed_s = kill_process(rng.choice(before).pid)

        def replaced() -> bool:
            now = part.find(attempt.all.rows())  # start times say nothing: Ray keeps processes ready
            return len(now) == len(before) and {row.pid for row in now} != {row.pid for row in before}

        attempt.wait_until(replaced, REPLACED_S, f"another {name} was there", LOOK_S)
        there_s = time.time()
        code = attempt.end()
        _note_left(outcome, attempt.left_after(30))
    works_s = part.works(read_timeline(attempt.run / "timeline.jsonl"), killed_s) if part.works else there_s
    outcome.replaced_s = there_s - killed_s
    _measure(outcome, attempt.run, killed_s, works_s, there_s)
    if part.works is None:
        outcome.works_s = outcome.recovery_s
    if code:
        outcome.broken.append(f"exit code {code}: {attempt.last_words()}")
    return outcome, attempt.run


def killed_driver(setting: Setting) -> tuple[Outcome, Path]:
    """The driver is killed, its Ray with it; the same command follows at once."""
    _, step, delay_s = setting.moment(DRIVER)
    name = setting.new_run(DRIVER)
    with Attempt(setting.folder, name, setting.train_seed) as first:
        first.wait_for_step(step)
        time.sleep(delay_s)
        first.all.look()
        outcome = Outcome(DRIVER, first.step(), delay_s)
        killed_s = kill_process(first.process.pid)
        with Attempt(setting.folder, name, setting.train_seed) as second:
            _go_on(outcome, second, killed_s)
            _note_left(outcome, first.left_after(0))
    return outcome, second.run


def killed_node(setting: Setting) -> tuple[Outcome, Path]:
    """The head node is lost with the driver on it; the same command follows at once on a new cluster.

    The processes on the lost head's worker node live on for a while, as they would on another machine.
    """
    _, step, delay_s = setting.moment(NODE)
    name = setting.new_run(NODE)
    folders = [setting.temporary / f"ray-{number}" for number in (1, 2)]
    for folder in folders:
        folder.mkdir()
    with ClusterNode(folders[0], "head") as head, ClusterNode(folders[0], "worker", head) as worker:
        with Attempt(setting.folder, name, setting.train_seed, head) as first:
            first.wait_for_step(step)
            time.sleep(delay_s)
            worker.all.look()
            outcome = Outcome(NODE, first.step(), delay_s)
            killed_s = kill_at_once(first, head)
        with (
            ClusterNode(folders[1], "head") as new_head,
            ClusterNode(folders[1], "worker", new_head),
            Attempt(setting.folder, name, setting.train_seed, new_head) as second,
        ):
            outcome.notes.append(f"{len(worker.all.rows())} processes of the old worker node met the second attempt")
            _go_on(outcome, second, killed_s)
    return outcome, second.run


def _go_on(outcome: Outcome, second: Attempt, killed_s: float) -> None:
    """Let the second attempt come to its end, and measure."""
    code = second.end()
    works_s = evidence.group_scored(read_timeline(second.run / "timeline.jsonl"), killed_s)
    _measure(outcome, second.run, killed_s, works_s, killed_s)
    if code:
        outcome.broken.append(f"exit code {code}: {second.last_words()}")


def _measure(outcome: Outcome, run: Path, killed_s: float, works_s: float | None, there_s: float) -> None:
    if works_s is None:
        return
    outcome.works_s = works_s - killed_s
    metrics = read_metrics(run / "metrics.jsonl")
    stepped_s = evidence.next_step(metrics, max(works_s, there_s), outcome.step)
    outcome.recovery_s = None if stepped_s is None else stepped_s - killed_s


def _note_left(outcome: Outcome, titles: list[str]) -> None:
    if titles:
        outcome.notes.append(f"{len(titles)} processes were left: {', '.join(sorted(set(titles)))}")
