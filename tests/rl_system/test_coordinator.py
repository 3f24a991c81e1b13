"""What the coordinator does with failed rewards, against a learner and servers that answer at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reward_servers.policies import FailFast, FailurePolicy, MinViableGroup, RetryThenDrop, RewardFailure
from rl_system.coordination.coordinator import Coordinator, Observer, Plan, StalledError
from rl_system.coordination.experience_queue import Checkpointed, Checkpointing, StepReport
from rl_system.coordination.ledger import GroupState
from tests.rl_system.runs.synthetic import scored_group
from vlcot.groups import Failed, Scored

pytestmark = pytest.mark.unit

WHOLE = scored_group(0, 1.0)
REASON = "qwen_vl failed 4 times; last: ConnectionError: gone"


def failed(group, count):
    """``group`` in which the first ``count`` samples have no reward."""
    bad = np.arange(len(group.valid)) < count
    scores = tuple({"generation": Failed(REASON) if b else Scored(0.5)} for b in bad)
    return replace(group, scores=scores, totals=np.where(bad, np.nan, 0.5), valid=~bad)


class Scorer:
    """Fails ``failures[n]`` samples in the n-th scoring (none after the last)."""

    def __init__(self, failures=()):
        self.failures = list(failures)
        self.scorings = 0
        self.left = ()

    def left_alone(self):
        return self.left

    def find_objects(self, prompt):
        return asyncio.get_running_loop().create_future()

    async def score(self, group, objects):
        await asyncio.sleep(0)
        count = self.failures[self.scorings] if self.scorings < len(self.failures) else 0
        self.scorings += 1
        return failed(replace(WHOLE, group=group), count)


class Queue:
    """The learner: a step for every batch, at once."""

    def __init__(self):
        self.reports = asyncio.Queue()
        self.batches = []
        self.closed = False
        self.put_batch = SimpleNamespace(remote=self._put)
        self.next_report = SimpleNamespace(remote=self.reports.get)
        self.close = SimpleNamespace(remote=self._close)
        self.let = []
        self.secured = SimpleNamespace(remote=self._secured)

    async def _put(self, step, groups):
        self.batches.append(groups)
        self.reports.put_nowait(StepReport(step, {}))

    async def _secured(self, step):
        self.let.append(step)

    async def _close(self, secured):
        self.let.append(secured)
        self.closed = True


class Pool:
    """Generates a group at once."""

    def __init__(self):
        self.generated = 0

    async def generate(self, prompt):
        self.generated += 1
        return replace(WHOLE.group, prompt=prompt)


class Store:
    """Has what ``stored`` says, by order of admission."""

    def __init__(self, stored=None):
        self.stored = stored or {}
        self.asked, self.kept, self.forgotten = {}, {}, []

    def take(self, order, prompt, oldest):
        self.asked[order] = oldest
        return self.stored.get(order)

    def keep(self, order, scored):
        self.kept[order] = scored

    def forget(self, admitted):
        self.forgotten.append(admitted)


def prompts(number=0):
    while True:
        yield replace(WHOLE.group.prompt, group_id=f"g{number}", row_id=f"row-{number}")
        number += 1


class Run:
    """A coordinator with everything around it; two steps of two groups."""

    def __init__(
        self,
        policy: FailurePolicy,
        scorer: Scorer,
        stall_timeout_s=30.0,
        done=(),
        steps=2,
        stored=None,
        max_staleness=0,
        unsafe: Exception | None = None,
    ) -> None:
        self.unsafe, self.safe = unsafe, []
        self.queue, self.pool, self.scorer, self.store = Queue(), Pool(), scorer, Store(stored)
        self.groups, self.records = [], []
        nothing = lambda *_: None  # noqa: E731
        self.coordinator = Coordinator(
            Plan(steps, 2, max_staleness, stall_timeout_s, policy),
            prompts(done[-1].admitted if done else 0),
            self.pool,
            scorer,
            self.queue,
            lambda: None,
            Observer(nothing, self.groups.append, self.records.append, nothing, nothing, nothing, self._secure),
            self.store,
            done,
        )

    async def _secure(self):
        if self.unsafe is not None:
            raise self.unsafe
        self.safe.append(len(self.records))

    async def wait(self):
        await asyncio.wait_for(self.coordinator.run(), 20)

    @property
    def trained(self):
        return [group.group.prompt.group_id for batch in self.queue.batches for group in batch]


def run(policy, failures=(), **options) -> Run:
    async def story():
        made = Run(policy, Scorer(failures), **options)
        await made.wait()
        return made

    return asyncio.run(story())


def test_without_failures_every_group_is_trained_once():
    done = run(FailFast())
    assert done.trained == ["g0", "g1", "g2", "g3"] and done.scorer.scorings == 4 and done.queue.closed


def test_a_group_is_scored_again_and_then_trained():
    done = run(RetryThenDrop(1), failures=[1])
    assert sorted(done.trained) == ["g0", "g1", "g2", "g3"] and done.scorer.scorings == 5
    assert all(group.valid.all() for batch in done.queue.batches for group in batch)


def test_a_group_that_keeps_failing_is_dropped_with_its_reason_and_replaced():
    done = run(MinViableGroup(0.75), failures=[2])
    ledger = done.coordinator.ledger
    assert ledger.counts()[GroupState.DROPPED] == 1 and len(done.trained) == 4 and "g0" not in done.trained
    assert ledger.dropped_rows() == {"row-0": f"2 of 4 samples have no reward: generation: {REASON} (2)"}
    assert len(done.groups) == 5


def test_enough_samples_are_trained_without_the_failed_one():
    done = run(MinViableGroup(0.75), failures=[1])
    assert done.trained == ["g0", "g1", "g2", "g3"]
    assert sum(int(group.valid.sum()) for batch in done.queue.batches for group in batch) == 15


def test_fail_fast_ends_the_run_with_group_and_reason():
    with pytest.raises(RewardFailure, match=r"group g\d: 1 of 4 samples have no reward: generation: qwen_vl"):
        run(FailFast(), failures=[0, 1])


def test_a_run_in_which_every_group_is_dropped_ends_and_says_why():
    with pytest.raises(StalledError, match=r"groups were dropped; the last: 4 of 4 samples .*ConnectionError: gone"):
        run(MinViableGroup(0.75), failures=[4] * 1_000_000, stall_timeout_s=0.2)


def test_no_prompt_is_admitted_while_a_server_is_left_alone():
    async def story():
        made = Run(FailFast(), Scorer())
        made.scorer.left = ("qwen_vl",)
        running = asyncio.create_task(made.wait())
        await asyncio.sleep(0.1)
        before = made.pool.generated
        made.scorer.left = ()
        await running
        return before, made

    before, done = asyncio.run(story())
    assert before == 0 and len(done.trained) == 4


def test_a_server_that_is_left_alone_for_too_long_is_named():
    async def story():
        made = Run(FailFast(), Scorer(), stall_timeout_s=0.2)
        made.scorer.left = ("qwen_vl",)
        await made.wait()

    with pytest.raises(StalledError, match="Left alone after failures: qwen_vl"):
        asyncio.run(story())


def test_a_run_that_goes_on_trains_what_is_left_and_nothing_again():
    first = run(MinViableGroup(0.75), failures=[0, 2, 0])
    assert [dict(record.rows) for record in first.records] == [{0: "row-0", 2: "row-2"}, {3: "row-3", 4: "row-4"}]
    assert list(first.records[0].dropped) == [1]
    second = run(MinViableGroup(0.75), done=first.records[:1], steps=3)
    assert second.trained == ["g3", "g4", "g5", "g6"] and [record.step for record in second.records] == [2, 3]
    ledger = second.coordinator.ledger
    assert ledger.trained_rows() == [f"row-{n}" for n in (0, 2, 3, 4, 5, 6)]
    assert list(ledger.dropped_rows()) == ["row-1"]


def test_a_run_that_is_done_has_nothing_left():
    first = run(FailFast())
    second = run(FailFast(), done=first.records)
    assert second.pool.generated == 0 and not second.queue.batches and second.queue.closed


def test_groups_of_an_earlier_attempt_take_their_place_and_are_not_generated():
    first = run(FailFast())
    second = run(FailFast(), done=first.records[:1], stored={3: first.store.kept[3]})
    assert second.trained == ["g2", "g3"] and second.pool.generated == second.scorer.scorings == 1
    assert second.queue.batches[0][1] is first.store.kept[3]
    assert [group.group.prompt.group_id for group in second.groups] == ["g2"]  # the other was seen before
    assert list(second.store.kept) == [2] and second.coordinator.ledger.trained_rows() == [f"row-{n}" for n in range(4)]


def test_a_group_is_stored_once_it_has_its_rewards_and_a_dropped_one_is_not():
    done = run(MinViableGroup(0.75), failures=[0, 2, 0])
    assert {order: group.group.prompt.group_id for order, group in done.store.kept.items()} == {
        0: "g0",
        2: "g2",
        3: "g3",
        4: "g4",
    }


def test_tokens_may_be_as_old_as_the_step_allows_that_the_group_is_trained_in_at_the_latest():
    """Two groups a step, two versions: the groups of one step after the other are asked for."""
    first = run(FailFast(), max_staleness=2, steps=5)
    second = run(FailFast(), max_staleness=2, steps=5, done=first.records[:2])
    assert {order: second.store.asked[order] for order in range(4, 10)} == {4: 0, 5: 0, 6: 1, 7: 1, 8: 2, 9: 2}


def test_a_checkpoint_ends_the_need_for_the_groups_up_to_its_step():
    async def story():
        made = Run(MinViableGroup(0.75), Scorer([0, 2, 0]), steps=3)
        put = made.queue._put

        async def checkpoints(step, groups):
            await put(step, groups)
            made.queue.reports.put_nowait(Checkpointed(step))

        made.queue.put_batch = SimpleNamespace(remote=checkpoints)
        await made.wait()
        return made

    done = asyncio.run(story())
    assert done.store.forgotten == [3, 5]  # group 1 was dropped; nobody waits for the checkpoint of the last step


def asking(**options) -> Run:
    """A run of two steps whose learner asks before a checkpoint of each."""
    made = Run(FailFast(), Scorer(), **options)
    put = made.queue._put

    async def asks(step, groups):
        await put(step, groups)
        made.queue.reports.put_nowait(Checkpointing(step))

    made.queue.put_batch = SimpleNamespace(remote=asks)
    return made


def test_a_checkpoint_is_allowed_once_the_records_of_its_step_are_safe():
    async def story():
        made = asking()
        await made.wait()
        return made

    done = asyncio.run(story())
    assert done.queue.let == [1, 2]  # the last one by the closing
    assert done.safe[0] >= 1 and done.safe[-1] == 2


def test_no_checkpoint_is_allowed_whose_records_cannot_be_stored():
    async def story():
        made = asking(unsafe=RuntimeError("the store does not answer"))
        with pytest.raises(RuntimeError, match="the store does not answer"):
            await made.wait()
        return made

    assert asyncio.run(story()).queue.let == [0]


def test_a_stop_lets_the_learner_finish_its_step():
    async def story():
        made = Run(FailFast(), Scorer(), steps=50)
        put = made.queue._put

        async def slow_learner(step, groups):
            made.queue.batches.append(groups)
            if step == 3:
                made.coordinator.stop()
                await asyncio.sleep(0)
                asyncio.get_running_loop().call_later(0.05, made.queue.reports.put_nowait, StepReport(step, {}))
            else:
                made.queue.batches.pop()
                await put(step, groups)

        made.queue.put_batch = SimpleNamespace(remote=slow_learner)
        await made.wait()
        return made

    stopped = asyncio.run(story())
    assert len(stopped.queue.batches) == len(stopped.records) == 3 and stopped.queue.closed
    assert stopped.coordinator.ledger.count(GroupState.TRAINED) == 6
