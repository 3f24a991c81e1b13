"""One training run from start to report: starts every part, evaluates, trains, evaluates again, writes it down."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from safetensors.torch import load_file

from actors.pool import RolloutPool
from learners.launch import LearnerGroup, LearnerResult
from learners.protocols import LearnerStart
from reward_servers.deploy import delete_apps, deploy
from reward_servers.http_guard import token_of_environment
from reward_servers.http_transport import HttpTransport
from reward_servers.policies import failure_reasons
from reward_servers.transports import HandleTransport, Transport
from rl_system import assembly, reward_apps
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import own_servers, servers
from rl_system.coordination.coordinator import Coordinator, Observer
from rl_system.coordination.evaluation import HeldOut, evaluate
from rl_system.coordination.experience_queue import ExperienceQueue, QueueProgress, QueueSource
from rl_system.coordination.ledger import BatchRecord
from rl_system.coordination.meter import PipelineMeter
from rl_system.coordination.scoring import Scorer
from rl_system.data.prompts import PromptBuilder, training_prompts
from rl_system.data.rows import RowSource
from rl_system.lookout import Lookout
from rl_system.runs.directory import RunDirectory, RunStopped
from rl_system.runs.evaluated import PromptFigures
from rl_system.runs.evaluation_files import read_evaluation, write_evaluation
from rl_system.runs.groups import GroupStore
from rl_system.runs.journal import Journal, read_journal
from rl_system.runs.live import keep_writing
from rl_system.runs.progress import Progress
from rl_system.runs.ready import ReadyGroups
from rl_system.runs.sinks import PrometheusSink, open_sinks, read_metrics
from rl_system.runs.summary import build_summary
from rl_system.runs.timeline import TimelineEvent, TimelineWriter
from rl_system.runs.trackers import open_trackers
from vlcot.groups import ScoredGroup
from vlcot.policy.family import Family
from vlcot.weights import checksums

LOG = logging.getLogger(__name__)


@dataclass
class Facts:
    """What the summary needs to know of a run. ``engines``: versions as imported in the worker processes."""

    engines: dict[str, Any] = field(default_factory=dict)
    kl_final: float = 0.0
    steps: int = 0
    groups_trained: int = 0
    groups_reused: int = 0


class TrainingRun:
    """Everything between ``ray.init`` and the summary.

    Args:
        config: checked configuration.
        run: run directory, fresh or with what earlier attempts left.
        resumed: whether there were any.
        source: rows of the data set.
        progress: live view.
        secure: returns once what was written to ``run`` so far outlives this machine, as far as it is to.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        resumed: bool,
        source: RowSource,
        progress: Progress,
        secure: Callable[[], None],
    ) -> None:
        self._secure = secure
        self._config = config
        self._run = run
        self._resumed = resumed
        self._source = source
        self._progress = progress
        self._meter = PipelineMeter()
        self._groups = GroupStore(run.groups, config.kept_groups)
        self._timeline = TimelineWriter(run.timeline)
        self._lookout = Lookout(progress, config.learner.steps)
        self._facts = Facts()

    async def execute(self) -> dict[str, Any]:
        """Run to the end; the summary.

        Raises:
            RunStopped: SIGTERM came while it trained.
            ValueError: what an earlier attempt left does not belong together.
        """
        began = time.time()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_ended, asyncio.create_task(keep_writing(self._run, self._lookout.state)))
            queue = ray.remote(num_cpus=0)(ExperienceQueue).remote()
            pool = await self._create_pool(stack)
            learner = self._start_learner(queue, pool)  # first: it takes as long as the servers
            scorer, _ = await _all_or_first_error(
                self._start_servers(stack, pool), asyncio.to_thread(self._build_prompts)
            )
            done = await self._steps_done(queue, learner)
            before = await self._before(pool, scorer, len(done))
            self._open_records(stack, done)
            coordinator = self._coordinator(queue, pool, scorer, learner, done)
            self._progress.stage("training")
            await self._train(coordinator, learner)
            after, result = await asyncio.gather(
                self._evaluate("after", pool, scorer), asyncio.to_thread(learner.result)
            )
            match = await self._weights_match(pool, result)
            self._ready.forget(self._ledger.counts().total())
        return self._summary(before, after, match, time.time() - began)

    def _build_prompts(self) -> None:
        """The way from rows to prompts, and the held-out ones."""
        from vlcot.tokenizer.image import ImageTokenizer  # seconds of CPU: not before the actors have begun to start

        config = self._config
        family = Family.from_pretrained(config.policy.path)
        tokenizer = ImageTokenizer.from_pretrained(config.policy.image_tokenizer)
        self._builder = PromptBuilder(family, tokenizer, config.policy.instruction)
        self._held_out = HeldOut.of(self._source, self._builder, config.evaluation.prompts, config.seed)

    async def _create_pool(self, stack: AsyncExitStack) -> RolloutPool:
        """Rollout actors whose engines begin to start."""
        config = self._config
        spec = assembly.rollout_spec(config)
        resources = {"CPU": config.rollout.num_cpus, "GPU": config.rollout.num_gpus}
        pool = RolloutPool(
            spec, config.rollout.actors, resources, config.rollout.start_timeout_s, labels=config.rollout.labels
        )
        stack.push_async_callback(asyncio.to_thread, pool.stop)
        await asyncio.to_thread(pool.create)
        self._lookout.pool = pool
        return pool

    async def _start_servers(self, stack: AsyncExitStack, pool: RolloutPool) -> Scorer:
        """Rollout actors and reward servers, all at the same time."""
        config = self._config
        self._progress.stage("starting rollout actors and reward servers")
        stack.push_async_callback(asyncio.to_thread, delete_apps, *own_servers(config))
        stop = threading.Event()
        stack.callback(stop.set)
        # Both to their end: what comes up after the other has failed must be there to be ended.
        _, transport = await _all_or_first_error(
            asyncio.to_thread(pool.start), asyncio.to_thread(_reward_transport, config, stop)
        )
        stack.push_async_callback(transport.close)
        self._facts.engines["rollout"] = pool.ready_info()
        for server in servers(config):
            try:
                ready = await asyncio.wait_for(transport.call(server, "ready", {}), config.reward.start_timeout_s)
            except TimeoutError:
                raise RuntimeError(f"{server} was not ready within {config.reward.start_timeout_s:g} s") from None
            self._facts.engines[server] = ready
        client = assembly.reward_client(config, transport)
        self._lookout.requests = client.stats
        return assembly.scorer(config, client)

    def _start_learner(self, queue: Any, pool: RolloutPool) -> LearnerGroup:
        config = self._config
        storage, files = self._run.learner_storage
        learner = LearnerGroup(
            assembly.learner_spec(config),
            QueueSource(queue),
            pool.weight_sink(config.rollout.push_backend),  # type: ignore[arg-type]
            QueueProgress(queue),
            storage_path=storage,
            files=files,
            name=config.name,
            resources={"CPU": config.learner.num_cpus} | ({"GPU": 1} if config.learner.use_gpu else {}),
            labels=config.learner.labels,
        )
        learner.start()
        return learner

    async def _steps_done(self, queue: Any, learner: LearnerGroup) -> list[BatchRecord]:
        """What earlier attempts have trained, as far as the learner's checkpoint has it; the learner is up then."""
        if not self._resumed:
            return []
        self._progress.stage("the learner loads its checkpoint")
        report = asyncio.ensure_future(queue.next_report.remote())
        while not report.done():
            if learner.error is not None:
                raise RuntimeError(f"the learner group failed: {learner.error}") from learner.error
            await asyncio.wait([report], timeout=1.0)
        start: LearnerStart = report.result()
        self._on_started(start)
        return read_journal(self._run.journal, start.step)

    async def _before(self, pool: RolloutPool, scorer: Scorer, done: int) -> list[PromptFigures]:
        """The evaluation before training; only the first attempt has the weights for it."""
        stored = read_evaluation(self._run, "before") if self._resumed else None
        if stored is not None:
            return stored.figures
        if done:
            raise ValueError(f"{self._run.evaluation}/before is missing: the run cannot be compared with its start")
        return [*await self._evaluate("before", pool, scorer)]

    def _open_records(self, stack: AsyncExitStack, done: list[BatchRecord]) -> None:
        """Files that go on behind the steps done."""
        self._journal = Journal(self._run.journal, len(done))
        self._lookout.sink = PrometheusSink(self._run.name)
        trackers = open_trackers(self._config.trackers, self._run)
        self._sink = open_sinks(self._run, len(done), self._lookout.sink, *trackers)
        self._ready = ReadyGroups(self._run.ready, done[-1].admitted if done else 0, len(done))
        stack.callback(self._journal.close)
        stack.callback(self._sink.close)
        stack.callback(self._ready.close)
        for metrics in read_metrics(self._run.metrics):
            self._meter.max_staleness = max(self._meter.max_staleness, metrics.values.get("staleness/max", 0.0))
            self._facts.kl_final = metrics.values.get("grpo/kl", self._facts.kl_final)
            self._facts.groups_reused += int(metrics.values.get("groups/reused", 0.0))
        self._facts.steps = len(done)
        self._facts.groups_trained = sum(len(record.rows) for record in done)

    def _coordinator(
        self, queue: Any, pool: RolloutPool, scorer: Scorer, learner: LearnerGroup, done: list[BatchRecord]
    ) -> Coordinator:
        config = self._config
        skip = done[-1].admitted if done else 0
        coordinator = Coordinator(
            assembly.plan(config),
            training_prompts(self._source, self._builder, config.data.train_rows, config.seed, skip),
            pool,
            scorer,
            queue,
            lambda: learner.error,
            self._observer(),
            self._ready,
            done,
        )
        self._ledger = coordinator.ledger
        self._lookout.moment = coordinator.moment
        return coordinator

    def _observer(self) -> Observer:
        return Observer(
            self._on_started,
            self._on_group,
            self._on_batch,
            self._on_step,
            self._meter.generating,
            self._on_event,
            lambda: asyncio.to_thread(self._secure),
        )

    async def _train(self, coordinator: Coordinator, learner: LearnerGroup) -> None:
        """To the last step; SIGTERM ends it after the step that is under way."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, coordinator.stop)
        try:
            await coordinator.run()
            if coordinator.stopping:
                self._progress.stage("stopping: the learner writes a checkpoint")
                result = await asyncio.to_thread(learner.result)
                raise RunStopped(f"stopped after step {result.steps} of {self._config.learner.steps}")
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    async def _evaluate(self, name: str, pool: RolloutPool, scorer: Scorer) -> Sequence[PromptFigures]:
        total = len(self._held_out.prompts)
        stage = f"evaluating {name} training"
        self._progress.stage(stage, 0, total)
        results = await evaluate(self._held_out, pool, scorer, lambda done: self._progress.stage(stage, done, total))
        write_evaluation(self._run, name, results, self._config.evaluation.pictures)
        return results

    async def _weights_match(self, pool: RolloutPool, result: LearnerResult) -> bool:
        """Whether the actors serve exactly the exported policy: XXH3 of every tensor, learner against actors."""
        served = await pool.served_checksums()
        policy = await asyncio.to_thread(self._run.local_policy, result.policy_path)
        exported = load_file(policy / "model.safetensors")
        return served == checksums(exported.items())

    def _on_started(self, start: LearnerStart) -> None:
        self._facts.engines["learner"] = dict(start.engines)
        LOG.info("the learner group is up", extra={"step": start.step})

    def _on_group(self, scored: ScoredGroup) -> None:
        self._meter.group(scored)
        self._groups.offer(scored)
        group = {"group_id": scored.group.prompt.group_id}
        LOG.info("scored: %d of %d samples have a total", scored.valid.sum(), scored.valid.size, extra=group)
        if reasons := failure_reasons(scored):
            LOG.warning("rewards failed: %s", reasons, extra=group)

    def _on_batch(self, record: BatchRecord) -> None:
        self._journal.write(record)
        for row, reason in record.dropped.values():
            LOG.warning("row %s was dropped: %s", row, reason, extra={"step": record.step})
        LOG.info("batch handed to the learner: rows %s", ", ".join(record.rows.values()), extra={"step": record.step})

    def _on_event(self, process: str, name: str, start: float, end: float) -> None:
        self._timeline.write(TimelineEvent(process, name, start, end))
        if process == "rewards":
            self._meter.reward(start, end)
        else:
            self._meter.generation(name, start, end)

    def _on_step(self, step: int, learner: dict[str, float], groups: list[ScoredGroup]) -> None:
        now = time.time()
        metrics = self._meter.step(learner, groups) | {"weights/version": float(step)} | self._ready.metrics(groups)
        self._timeline.write(TimelineEvent("learner", f"step {step}", now - learner.get("time/train", 0.0), now))
        self._sink.log(step, metrics)
        LOG.info("step trained and pushed in %.2f s", metrics["time/step"], extra={"step": step})
        self._facts.kl_final = metrics.get("grpo/kl", self._facts.kl_final)
        self._facts.steps = step
        self._facts.groups_trained += len(groups)
        self._facts.groups_reused += int(metrics["groups/reused"])
        counts = {str(state): count for state, count in self._ledger.counts().items()}
        self._progress.update(step, self._config.learner.steps, metrics, counts)

    def _summary(
        self, before: Sequence[PromptFigures], after: Sequence[PromptFigures], match: bool, wall_s: float
    ) -> dict[str, Any]:
        return build_summary(
            before,
            after,
            seed=self._config.seed,
            kl_final=self._facts.kl_final,
            steps=self._facts.steps,
            groups_trained=self._facts.groups_trained,
            groups_reused=self._facts.groups_reused,
            wall_s=wall_s,
            max_staleness_seen=int(self._meter.max_staleness),
            engines=self._facts.engines,
            weight_checksum_match=match,
        )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _all_or_first_error(*parts: Awaitable[Any]) -> list[Any]:
    """Results of all; raises the first error only once all have ended."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _reward_transport(config: TrainConfig, stop: threading.Event) -> Transport:
    """The way to the reward servers: those at ``reward.url``, or own ones, started here."""
    if config.reward.url is not None:
        return HttpTransport(config.reward.url, token_of_environment())
    return HandleTransport(deploy(reward_apps.applications(config), config.reward.start_timeout_s, stop))
