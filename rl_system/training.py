"""One training run from start to report: starts every part, evaluates, trains, evaluates again, writes it down."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
from safetensors.torch import load_file

from actors.pool import RolloutPool
from learners.launch import LearnerGroup, LearnerResult
from learners.protocols import LearnerStart
from reward_servers.client import GROUNDED_SAM, QWEN_VL, RewardClient
from reward_servers.deploy import delete_apps, deploy_grounded_sam, deploy_visual_expert
from rl_system import assembly
from rl_system.config.schema import TrainConfig
from rl_system.coordination.coordinator import Coordinator, Observer
from rl_system.coordination.evaluation import HeldOut, evaluate
from rl_system.coordination.experience_queue import ExperienceQueue, QueueProgress, QueueSource
from rl_system.coordination.meter import PipelineMeter
from rl_system.coordination.scoring import Scorer
from rl_system.data.prompts import PromptBuilder, training_prompts
from rl_system.data.rows import RowSource
from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluated import EvaluatedPrompt
from rl_system.runs.evaluation_files import write_evaluation
from rl_system.runs.groups import GroupStore
from rl_system.runs.progress import Progress
from rl_system.runs.sinks import MetricSink
from rl_system.runs.summary import build_summary
from rl_system.runs.timeline import TimelineEvent, TimelineWriter
from vlcot.policy.family import Family
from vlcot.rewards import ExpertWeights, RewardWeights
from vlcot.tokenizer.image import ImageTokenizer
from vlcot.weights import checksums

NAMESPACE = "rl-system"


@dataclass
class Facts:
    """What the summary needs to know of a run. ``engines``: versions as imported in the worker processes."""

    engines: dict[str, Any] = field(default_factory=dict)
    kl_final: float = 0.0
    steps: int = 0
    groups_trained: int = 0


class TrainingRun:
    """Everything between ``ray.init`` and the summary.

    Args:
        config: checked configuration.
        run: fresh run directory.
        source: rows of the data set.
        sink: of metrics.
        progress: live view.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, source: RowSource, sink: MetricSink, progress: Progress
    ) -> None:
        self._config = config
        self._run = run
        self._sink = sink
        self._progress = progress
        family = Family.from_pretrained(config.policy.path)
        tokenizer = ImageTokenizer.from_pretrained(config.policy.image_tokenizer)
        builder = PromptBuilder(family, tokenizer, config.policy.instruction)
        self._prompts = training_prompts(source, builder, config.data.train_rows, config.seed)
        self._held_out = HeldOut.of(source, builder, config.evaluation.prompts, config.seed)
        self._meter = PipelineMeter()
        self._groups = GroupStore(run.groups, config.kept_groups)
        self._timeline = TimelineWriter(run.timeline)
        self._facts = Facts()

    async def execute(self) -> dict[str, Any]:
        """Run to the end; the summary."""
        began = time.time()
        async with AsyncExitStack() as stack:
            queue = ray.remote(num_cpus=0)(ExperienceQueue).remote()
            pool, scorer = await self._start_servers(stack)
            learner = self._start_learner(queue, pool)
            before = await self._evaluate("before", pool, scorer)
            coordinator = Coordinator(
                assembly.plan(self._config),
                self._prompts,
                pool,
                scorer,
                queue,
                lambda: learner.error,
                Observer(self._on_started, self._on_group, self._on_step, self._on_event),
            )
            self._ledger = coordinator.ledger
            self._progress.stage("training")
            await coordinator.run()
            after, result = await asyncio.gather(
                self._evaluate("after", pool, scorer), asyncio.to_thread(learner.result)
            )
            match = await self._weights_match(pool, result)
        return self._summary(before, after, match, time.time() - began)

    async def _start_servers(self, stack: AsyncExitStack) -> tuple[RolloutPool, Scorer]:
        """Rollout actors and reward servers, all at the same time."""
        config = self._config
        self._progress.stage("starting rollout actors and reward servers")
        spec = assembly.rollout_spec(config)
        resources = {"CPU": config.rollout.num_cpus, "GPU": config.rollout.num_gpus}
        pool = RolloutPool(
            spec, config.rollout.actors, resources, config.rollout.start_timeout_s, labels=config.rollout.labels
        )
        stack.push_async_callback(asyncio.to_thread, pool.stop)
        stack.push_async_callback(asyncio.to_thread, delete_apps, GROUNDED_SAM, QWEN_VL)
        _, (sam, expert) = await asyncio.gather(
            asyncio.to_thread(pool.start), asyncio.to_thread(_deploy_reward_servers, config)
        )
        client = RewardClient(
            sam, expert, config.reward.timeout_s, settings=repr(assembly.detector_config(config)), seed=config.seed
        )
        weights = RewardWeights(**vars(config.reward.weights))
        self._facts.engines["rollout"] = pool.ready_info()
        self._facts.engines["grounded_sam"] = await sam.ready.remote()
        self._facts.engines["qwen_vl"] = await expert.ready.remote()
        return pool, Scorer(client, weights, ExpertWeights(**vars(config.reward.expert_weights)))

    def _start_learner(self, queue: Any, pool: RolloutPool) -> LearnerGroup:
        config = self._config
        learner = LearnerGroup(
            assembly.learner_spec(config),
            QueueSource(queue),
            pool.weight_sink(),
            QueueProgress(queue),
            storage_path=self._run.checkpoints,
            name=config.name,
            resources={"CPU": config.learner.num_cpus} | ({"GPU": 1} if config.learner.use_gpu else {}),
            labels=config.learner.labels,
        )
        learner.start()
        return learner

    async def _evaluate(self, name: str, pool: RolloutPool, scorer: Scorer) -> list[EvaluatedPrompt]:
        total = len(self._held_out.prompts)
        stage = f"evaluating {name} training"
        self._progress.stage(stage, 0, total)
        results = await evaluate(self._held_out, pool, scorer, lambda done: self._progress.stage(stage, done, total))
        write_evaluation(self._run, name, results, self._config.evaluation.pictures)
        return results

    async def _weights_match(self, pool: RolloutPool, result: LearnerResult) -> bool:
        """Whether the actors serve exactly the exported policy: CRC-32 of every tensor, learner against actors."""
        served = await pool.served_checksums()
        exported = load_file(result.policy_path / "model.safetensors")
        return served == checksums(exported.items())

    def _on_started(self, start: LearnerStart) -> None:
        self._facts.engines["learner"] = dict(start.engines)

    def _on_group(self, scored: Any) -> None:
        self._meter.group(scored)
        self._groups.offer(scored)

    def _on_event(self, process: str, name: str, start: float, end: float) -> None:
        self._timeline.write(TimelineEvent(process, name, start, end))
        if process == "rewards":
            self._meter.reward(start, end)
        else:
            self._meter.generation(start, end)

    def _on_step(self, step: int, learner: dict[str, float], groups: list[Any]) -> None:
        now = time.time()
        metrics = self._meter.step(learner, groups) | {"weights/version": float(step)}
        self._timeline.write(TimelineEvent("learner", f"step {step}", now - learner.get("time/train", 0.0), now))
        self._sink.log(step, metrics)
        self._facts.kl_final = metrics.get("grpo/kl", self._facts.kl_final)
        self._facts.steps = step
        self._facts.groups_trained += len(groups)
        counts = {str(state): count for state, count in self._ledger.counts().items()}
        self._progress.update(step, self._config.learner.steps, metrics, counts)

    def _summary(
        self, before: list[EvaluatedPrompt], after: list[EvaluatedPrompt], match: bool, wall_s: float
    ) -> dict[str, Any]:
        return build_summary(
            before,
            after,
            seed=self._config.seed,
            kl_final=self._facts.kl_final,
            steps=self._facts.steps,
            groups_trained=self._facts.groups_trained,
            wall_s=wall_s,
            max_staleness_seen=int(self._meter.max_staleness),
            engines=self._facts.engines,
            weight_checksum_match=match,
        )


def _deploy_reward_servers(config: TrainConfig) -> tuple[Any, Any]:
    """Handles of both applications; one after the other, since Serve's deployment API is not thread-safe."""
    sam = deploy_grounded_sam(assembly.detector_config(config), assembly.detector_app(config))
    return sam, deploy_visual_expert(assembly.expert_config(config), assembly.expert_app(config))
