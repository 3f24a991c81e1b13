"""The pipeline of a training run as a discrete-event simulation: who waits for whom, and for how long.

It follows ``rl_system.coordination``: (max_staleness + 1) * groups_per_step slots, each held from admission until the
step of its group was pushed; rollout actors and replicas are chosen by the fewest open requests; the detector is asked
at admission; the visual expert judges whole groups; batches are formed in order of admission.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np

from rl_system.studies.scaling.events import Clock, Cores, Done, Engine, EngineCost

KINDS = ("learner", "rollout", "detector", "expert", "decoder", "driver")

STEADY_GROUPS = 960
"""Groups over which :func:`steady` takes its means at least: actors that finish in waves make single steps uneven."""


@dataclass(frozen=True)
class LearnerCost:
    """Seconds of the learner group, alone.

    Attributes:
        fixed_s: of a step, whatever it trains.
        group_s: more for each group.
        push_s: of a weight push while generation goes on.
        load_s: of a weight push while generation stands still.
        threads: cores that it can use; only on a shared machine.
    """

    fixed_s: float
    group_s: float
    push_s: float
    load_s: float
    threads: float = 1.0


@dataclass(frozen=True)
class Pipeline:
    """A setting and its costs.

    Attributes:
        group_size: chains of a group.
        tokens: mean length of a chain.
        tokens_std: standard deviation of the lengths.
        rollout: of one actor; its jobs are chains, its unit is a token.
        detector: of one replica; its jobs are images, and one unit each.
        expert: of one replica; its jobs are groups, and one unit each.
        decoder: of one rollout actor, what makes images of a group's codes; its jobs are groups, and one unit each.
            None: the time is part of ``rollout``.
        replicas: rollout actors, detectors, experts.
        admit_s: of the driver for each group at admission; it does one thing at a time.
        collect_s: of the driver for each group that has its rewards.
        delay_s: of further rewards, which are asked together with the expert and neither queue nor use a device.
        cores: that everything shares; None: each engine has its own device.
    """

    groups_per_step: int
    max_staleness: int
    group_size: int
    tokens: float
    tokens_std: float
    rollout: EngineCost
    detector: EngineCost
    expert: EngineCost
    learner: LearnerCost
    decoder: EngineCost | None = None
    replicas: tuple[int, int, int] = (1, 1, 1)
    admit_s: float = 0.0
    collect_s: float = 0.0
    delay_s: float = 0.0
    cores: float | None = None

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or self.group_size < 1 or min(self.replicas) < 1:
            raise ValueError("groups_per_step, group_size and the numbers of replicas must be positive")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness={self.max_staleness} must not be negative")


@dataclass(frozen=True)
class Outcome:
    """What a simulated run did. Times are seconds.

    Attributes:
        step_ends: at which each step was pushed; the run starts at 0.
        generation_s: mean from a group's arrival at its actor until it has its images.
        reward_s: mean from there until it has its rewards.
        train_s: mean of a step of the learner, without waiting for its batch and without the push.
        push_s: mean of a push.
        busy: share of the time in which the engines of a kind were at work.

    Everything but ``step_ends`` is of what ended after the first ``skip`` steps; NaN if nothing did.
    """

    step_ends: tuple[float, ...]
    generation_s: float
    reward_s: float
    train_s: float
    push_s: float
    busy: dict[str, float]
    skip: int

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return (self.step_ends[-1] - self.step_ends[self.skip - 1]) / (len(self.step_ends) - self.skip)


def simulate(
    pipeline: Pipeline, steps: int, learner_start_s: float = 0.0, skip: int = 1, ends: bool = True, seed: int = 0
) -> Outcome:
    """Run ``steps`` steps of ``pipeline``.

    Args:
        learner_start_s: when the learner is up; groups are admitted from 0 on.
        skip: steps, at least 1, that are left out of all means, while the pipeline fills.
        ends: the run admits no more groups than it trains; else it is stopped in full swing.
        seed: of the lengths of the chains.

    Raises:
        ValueError: no steps are left to measure.
    """
    if not 1 <= skip < steps:
        raise ValueError(f"skip={skip} of steps={steps}: at least one step is left out, and at least one must remain")
    return _Run(pipeline, steps, learner_start_s, skip, ends, seed).outcome()


def steady(pipeline: Pipeline) -> Outcome:
    """A long run, from its middle: the pipeline has been filled, and goes on."""
    steps = max(10, math.ceil(STEADY_GROUPS / pipeline.groups_per_step))
    skip = 2 * (pipeline.max_staleness + 1)
    return simulate(pipeline, skip + steps, skip=skip, ends=False)


class _Run:
    def __init__(
        self, pipeline: Pipeline, steps: int, learner_start_s: float, skip: int, ends: bool, seed: int
    ) -> None:
        self._p, self._steps, self._skip = pipeline, steps, skip
        self._clock = Clock()
        cores = Cores(pipeline.cores)

        def engines(cost: EngineCost, count: int) -> list[Engine]:
            return [Engine(cost, self._clock, cores) for _ in range(count)]

        actors, detectors, experts = pipeline.replicas
        self._engines = {
            "learner": engines(EngineCost(1.0, 0.0, 1, pipeline.learner.threads), 1),
            "rollout": engines(pipeline.rollout, actors),
            "detector": engines(pipeline.detector, detectors),
            "expert": engines(pipeline.expert, experts),
            "decoder": engines(pipeline.decoder, actors) if pipeline.decoder else [],
            "driver": engines(EngineCost(1.0, 0.0, 1), 1),
        }
        (self._learner,), (self._driver,) = self._engines["learner"], self._engines["driver"]
        self._open = {kind: [0] * len(engines) for kind, engines in self._engines.items()}
        self._groups = (steps if ends else steps + pipeline.max_staleness + 1) * pipeline.groups_per_step
        shape = self._groups, pipeline.group_size
        lengths = np.random.default_rng(seed).normal(pipeline.tokens, pipeline.tokens_std, shape)
        self._lengths = np.maximum(lengths, 1.0).tolist()
        self._admitted = self._trained = 0
        self._ready: set[int] = set()
        self._training = False
        self._durations: dict[str, list[float]] = {name: [] for name in ("generation", "reward", "train", "push")}
        self._step_ends: list[float] = []
        self._skipped: dict[str, float] = {}
        self._learner_is_up = False
        self._clock.after(learner_start_s, self._learner_up)

    def outcome(self) -> Outcome:
        self._admit()
        self._clock.run()
        wall = self._step_ends[-1] - self._step_ends[self._skip - 1]
        work = self._work()
        seconds = {name: mean(values) if values else math.nan for name, values in self._durations.items()}
        return Outcome(
            step_ends=tuple(self._step_ends),
            generation_s=seconds["generation"],
            reward_s=seconds["reward"],
            train_s=seconds["train"],
            push_s=seconds["push"],
            busy={
                kind: (work[kind] - self._skipped[kind]) / wall / len(engines)
                for kind, engines in self._engines.items()
                if engines
            },
            skip=self._skip,
        )

    def _work(self) -> dict[str, float]:
        """Busy seconds of each kind so far."""
        for engine in (e for engines in self._engines.values() for e in engines):
            engine.settle()
        return {kind: sum(e.busy_s for e in engines) for kind, engines in self._engines.items()}

    def _timed(self, name: str, done: Done) -> Done:
        """``done``, preceded by noting how long it took from now on."""
        began = self._clock.now

        def call() -> None:
            self._durations[name].append(self._clock.now - began)
            done()

        return call

    # --- groups -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        slots = (self._p.max_staleness + 1) * self._p.groups_per_step
        while self._admitted < min(self._groups, self._trained + slots):
            self._driver.submit(partial(self._start, self._admitted), self._p.admit_s)
            self._admitted += 1

    def _start(self, order: int) -> None:
        """Generation and detection, side by side."""
        both = _after(2, partial(self._judge, order))
        self._ask("detector", both)
        actor = self._choose("rollout")
        generated = self._timed("generation", self._closing("rollout", actor, both))
        decoders = self._engines["decoder"]
        decode = partial(decoders[actor].submit, generated, 1.0) if decoders else generated
        self._engines["rollout"][actor].submit(_after(self._p.group_size, decode), *self._lengths[order])

    def _judge(self, order: int) -> None:
        scored = _after(2, self._timed("reward", partial(self._collect, order)))
        self._ask("expert", scored)
        self._clock.after(self._p.delay_s, scored)

    def _collect(self, order: int) -> None:
        self._driver.submit(partial(self._collected, order), self._p.collect_s)

    def _collected(self, order: int) -> None:
        self._ready.add(order)
        self._offer()

    def _ask(self, kind: str, done: Done) -> None:
        """One unit from the engine of ``kind`` that has the fewest open requests."""
        index = self._choose(kind)
        self._engines[kind][index].submit(self._closing(kind, index, done), 1.0)

    def _choose(self, kind: str) -> int:
        counts = self._open[kind]
        index = counts.index(min(counts))
        counts[index] += 1
        return index

    def _closing(self, kind: str, index: int, done: Done) -> Done:
        """``done``, preceded by counting a request as answered."""

        def call() -> None:
            self._open[kind][index] -= 1
            done()

        return call

    # --- learner ----------------------------------------------------------------------------------------

    def _learner_up(self) -> None:
        self._learner_is_up = True
        self._offer()

    def _offer(self) -> None:
        g, learner = self._p.groups_per_step, self._p.learner
        batch = range(self._trained, self._trained + g)
        if not self._training and self._learner_is_up and len(self._ready) >= g and self._ready.issuperset(batch):
            self._training = True
            self._ready.difference_update(batch)
            self._learner.submit(self._timed("train", self._push), learner.fixed_s + g * learner.group_s)

    def _push(self) -> None:
        self._learner.submit(partial(self._load, self._timed("push", self._pushed)), self._p.learner.push_s)

    def _load(self, loaded: Done) -> None:
        for engine in self._engines["rollout"]:
            engine.pause(True)
        self._clock.after(self._p.learner.load_s, loaded)

    def _pushed(self) -> None:
        for engine in self._engines["rollout"]:
            engine.pause(False)
        self._training = False
        self._trained += self._p.groups_per_step
        self._step_ends.append(self._clock.now)
        if len(self._step_ends) == self._skip:
            self._skipped = self._work()
            for durations in self._durations.values():
                durations.clear()
        if len(self._step_ends) == self._steps:
            self._clock.stop()
        self._admit()
        self._offer()


def _after(count: int, done: Done) -> Done:
    """Calls ``done`` when it is called for the ``count``-th time."""
    left = [count]

    def call() -> None:
        left[0] -= 1
        if not left[0]:
            done()

    return call
