"""What happens in one simulated run, and when. Times are simulated seconds from its begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from reward_servers.policies import FailurePolicy, MinViableGroup

STALL_TIMEOUT_S = 200.0
PATIENCE_S = 15.0
"""Deadline of one request to a reward server."""


class Hang(StrEnum):
    """What never answers again from ``Schedule.hang_at`` on."""

    NOTHING = "nothing"
    ALL_ACTORS = "all actors"
    ONE_ACTOR = "one actor"
    RESTARTS = "all actors are dead and do not come back"
    SERVERS = "servers, with a deadline"
    PATIENT_SERVERS = "servers, without one"
    LEARNER = "the learner"
    QUEUE = "the experience queue"


class End(StrEnum):
    """How a driver ends before its time."""

    KILL = "SIGKILL"
    STOP = "SIGTERM"


class Damage(StrEnum):
    """What is done to the run directory while no driver lives."""

    CUT = "a stored group has only its first half"
    FLIP = "a byte of a stored group is another"
    LOSE = "a stored group is gone"
    LEFTOVER = "a half-written file lies beside them"


@dataclass(frozen=True)
class Pace:
    """Longest time of each activity; the true one is drawn anew every time, uniform from 0."""

    generate: float = 3.0
    score: float = 3.0
    train: float = 3.0
    push: float = 1.0
    call: float = 0.1
    write: float = 0.1
    restart: float = 3.0


@dataclass(frozen=True)
class Schedule:
    """One run.

    Attributes:
        seed: of every delay and of what fails.
        actor_deaths: a random actor dies; its prompts in flight are lost.
        engine_deaths: a random actor's engine dies: the actor answers, but is of no use.
        learner_deaths: all ranks die; they go on behind the last checkpoint.
        driver_ends: the driver ends, and everything with it, and is started again; seconds of its life.
        damages: after each end of a driver, one or none of these.
        failure_rate: share of requests to a reward server that fail.
        undetected: rows for which the detector always fails: no sample has a reward.
        unjudged: rows for which the visual expert always fails: samples without a final image have a reward.
        outages: begin and length: every request fails.
    """

    seed: int
    groups_per_step: int = 2
    max_staleness: int = 1
    steps: int = 3
    actors: int = 2
    group_size: int = 3
    checkpoint_every: int = 2
    policy: FailurePolicy = field(default_factory=MinViableGroup)
    pace: Pace = field(default_factory=Pace)
    actor_deaths: tuple[float, ...] = ()
    engine_deaths: tuple[float, ...] = ()
    learner_deaths: tuple[float, ...] = ()
    driver_ends: tuple[tuple[float, End], ...] = ()
    damages: tuple[Damage | None, ...] = ()
    failure_rate: float = 0.0
    undetected: frozenset[int] = frozenset()
    unjudged: frozenset[int] = frozenset()
    outages: tuple[tuple[float, float], ...] = ()
    hang: Hang = Hang.NOTHING
    hang_at: float = 0.0

    @property
    def actor_failures(self) -> int:
        """How often an actor or its engine dies."""
        at_once = self.actors if self.hang is Hang.RESTARTS else 0
        return len(self.actor_deaths) + len(self.engine_deaths) + at_once

    @property
    def rewards_fail(self) -> bool:
        """Whether a reward may fail."""
        return self.failure_rate > 0 or bool(self.outages or self.undetected or self.unjudged)
