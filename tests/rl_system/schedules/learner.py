"""The simulated learner group, and what it must never be given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import numpy as np

from learners.batching import build_batch
from learners.protocols import LearnerStart
from learners.spec import LearnerSpec
from rl_system.coordination.experience_queue import StepReport
from rl_system.coordination.ledger import BatchRecord
from tests.rl_system.schedules.processes import Handle, now
from tests.rl_system.schedules.rewards import check_scores, row_of, true_rewards
from tests.rl_system.schedules.schedule import Hang, Schedule
from vlcot.groups import ScoredGroup
from vlcot.grpo import LossConfig

EPS = 1e-4


class SimulatedLearner:
    """:func:`learners.loop.train_loop` without the training, restarted as Ray Train does.

    Args:
        queue: of batches and reports.
        push: sends the weights of a version to the actors.
        trained: rows by step that its checkpoint has; the learner writes on in it.
        journal: of the driver.
        failed_rows: rows of which a request to a reward server failed.
        lives: step of the checkpoint that each driver went on from, by its number; the last is the one that lives.
    """

    def __init__(
        self,
        schedule: Schedule,
        chance: Random,
        queue: Handle,
        push: Callable[[int], Awaitable[None]],
        trained: dict[int, list[int]],
        journal: list[BatchRecord],
        failed_rows: set[int],
        lives: dict[int, int],
        secured: Callable[[], int],
    ) -> None:
        self._secured = secured
        self._lives = lives
        self._schedule = schedule
        self._chance = chance
        self._queue = queue
        self._push = push
        self._journal = journal
        self._failed_rows = failed_rows
        self.trained = trained
        self.saved = len(trained)
        """Step of the last checkpoint."""
        self._given: dict[int, list[int]] = {}
        self._life: asyncio.Task[None] | None = None
        self._spec = LearnerSpec(
            policy_path="none",
            reference_path=None,
            steps=schedule.steps,
            groups_per_step=schedule.groups_per_step,
            temperature=1.0,
            max_staleness=schedule.max_staleness,
            loss=LossConfig(kl_beta=0.0),
        )
        self.error: BaseException | None = None
        self.last_report = 0.0
        self.steps = 0

    def die(self) -> None:
        """All ranks at once."""
        if self._life is not None:
            self._life.cancel()

    async def run(self) -> None:
        """Until the steps are done or the queue is closed, over all deaths."""
        while True:
            self._life = asyncio.create_task(self._loop())
            await asyncio.wait([self._life])
            if not self._life.cancelled():
                self.error = self._life.exception()
                return
            await self._wait(self._schedule.pace.restart)

    async def _loop(self) -> None:
        done = saved = self.saved
        for step in [step for step in self.trained if step > done]:
            del self.trained[step]
        if done:
            await self._push(done)
        await self._report(LearnerStart(done, {}, {}))
        while done < self._schedule.steps:
            groups = await self._queue.next_batch.remote(done + 1)
            if groups is None:
                break
            self._train(done + 1, groups)
            await self._wait(self._schedule.pace.train)
            await self._push(done + 1)
            done += 1
            await self._report(StepReport(done, {}))
            if done % self._schedule.checkpoint_every == 0:
                saved = await self._checkpoint(done)
        if saved != done:
            await self._checkpoint(done)
        self.steps = done

    async def _checkpoint(self, step: int) -> int:
        await self._queue.checkpointing.remote(step)
        self.last_report = now()
        assert self._secured() >= step, f"a checkpoint of step {step} is written before its rows are safe"
        await self._wait(self._schedule.pace.push)
        self.saved = step
        await self._queue.forget.remote(step)
        return step

    async def _report(self, event: LearnerStart | StepReport) -> None:
        await self._queue.report.remote(event)
        self.last_report = now()

    async def _wait(self, longest: float) -> None:
        if self._schedule.hang is Hang.LEARNER and now() >= self._schedule.hang_at:
            await asyncio.Event().wait()
        await asyncio.sleep(self._chance.uniform(0, longest))

    def _train(self, step: int, groups: list[ScoredGroup]) -> None:
        rows = [row_of(group.group.prompt) for group in groups]
        assert self._given.setdefault(step, rows) == rows, f"step {step} was given other groups before"
        assert list(self._journal[step - 1].rows) == rows, f"step {step} is not in the journal before it is trained"
        check_versions(groups, step - 1, self._schedule.max_staleness)
        check_lineage(groups, self._lives)
        check_batch(groups, step - 1, self._spec, self._failed_rows)
        self.trained[step] = rows


def check_versions(groups: list[ScoredGroup], version: int, bound: int) -> None:
    """I1: what weights ``version`` are trained on was sampled by them or by weights at most ``bound`` older."""
    for group in groups:
        for sample in group.group.samples:
            for span in sample.versions:
                lag = version - span.version
                assert 0 <= lag <= bound, f"weights {version} are trained on tokens of weights {span.version}"


def check_lineage(groups: list[ScoredGroup], lives: dict[int, int]) -> None:
    """No token was sampled by weights that a later driver did not go on from: they are not those of this run."""
    for group in groups:
        maker = int(group.group.actor.split("/")[0])
        newest = max(span.version for sample in group.group.samples for span in sample.versions)
        lost = [f"driver {n} went on from {step}" for n, step in lives.items() if n > maker and step < newest]
        assert not lost, f"driver {maker} sampled by weights {newest}: {lost}"


def check_batch(groups: list[ScoredGroup], version: int, spec: LearnerSpec, failed_rows: set[int]) -> None:
    """I3: advantages and denominators are those of the samples that have all their rewards, and of no others."""
    advantages: list[float] = []
    samples = []
    for group in groups:
        known = check_scores(group, failed_rows)
        row = row_of(group.group.prompt)
        totals = np.array([sum(true_rewards(row, place).values()) for place in np.flatnonzero(known)])
        if len(totals) < 2:
            continue
        spread = totals - totals.mean() if np.ptp(totals) > 1e-9 else np.zeros_like(totals)
        advantages += (spread / (np.sqrt((spread**2).sum() / (len(totals) - 1)) + EPS)).tolist()
        samples += [group.group.samples[place] for place in np.flatnonzero(known)]
    batch = build_batch(groups, version, spec)
    assert [s.sample for s in batch.sequences] == samples
    np.testing.assert_allclose([s.advantage for s in batch.sequences], advantages, atol=1e-5)
    tokens = sum(int((sample.supports != 0).sum()) for sample in samples)
    assert (batch.denominators.sequences, batch.denominators.tokens) == (len(samples), tokens)
