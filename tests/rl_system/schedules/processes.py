"""Simulated processes: rollout actors that die, the pool around them, a learner that dies and goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from actors.errors import EngineLostError, StaleWeightsError
from actors.pool import RolloutPool
from actors.push import StoredPush
from actors.weight_store import WeightStore
from tests.rl_system.schedules.rewards import final_image, row_of, sample_chain
from tests.rl_system.schedules.schedule import Hang, Schedule
from vlcot.groups import Group, Prompt, Sample, VersionSpan

TOKENS = 4
IDS = np.arange(TOKENS, dtype=np.int32)
LOGPROBS = np.zeros(TOKENS, np.float32)
SUPPORTS = np.array([0, 1, 0, 1], np.uint8)


def now() -> float:
    return asyncio.get_running_loop().time()


class Handle:
    """A Ray actor handle: what is called runs by itself, also after its caller is gone."""

    def __init__(self, served: Any, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.served = served
        self._delay = delay

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: asyncio.shield(asyncio.create_task(self._call(name, args))))

    async def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        await asyncio.sleep(self._delay())
        result = getattr(self.served, name)(*args)
        result = await result if asyncio.iscoroutine(result) else result
        await asyncio.sleep(self._delay())
        return result


class SimulatedActor:
    """A :class:`actors.rollout_actor.RolloutActor` that only passes time and knows which weights it has."""

    def __init__(self, index: int, schedule: Schedule, chance: Random, driver: int = 0) -> None:
        self._index = index
        self._driver = driver
        self._schedule = schedule
        self._chance = chance
        self.alive = True
        self.life = 0
        self._broken = False
        self._open: set[asyncio.Future[None]] = set()
        self._versions = [(0.0, 0)]
        """From when on which weights."""

    def die(self) -> None:
        """The process is gone with all its calls; Ray starts another one, with the weights on disk."""
        self.alive = False
        self.life += 1
        self._fail(RayActorError())
        if self._schedule.hang is not Hang.RESTARTS or now() < self._schedule.hang_at:
            life, delay = self.life, self._chance.uniform(0, self._schedule.pace.restart)
            asyncio.get_running_loop().call_later(delay, self._start, life)

    def _start(self, life: int) -> None:
        if life == self.life:
            self.alive, self._broken, self._versions = True, False, [(now(), 0)]

    def lose_engine(self) -> None:
        """The engine is gone, the actor is not."""
        if self.alive:
            self._broken = True
            self._fail(EngineLostError("the vLLM engine died"))

    def _fail(self, error: Exception) -> None:
        for future in self._open:
            if not future.done():
                future.set_exception(error)
        self._open.clear()

    async def generate(self, prompt: Prompt, minimum_version: int) -> Group:
        self._check()
        if self.version < minimum_version:
            raise StaleWeightsError(f"weights {self.version}, {minimum_version} is asked for")
        begin, seconds = now(), self._chance.uniform(0, self._schedule.pace.generate)
        await self._pass(math.inf if self._hangs() else seconds)
        times = [begin + seconds * (token + 1) / TOKENS for token in range(TOKENS)]
        spans = self._spans(times)
        samples = tuple(_sample(row_of(prompt), place, spans) for place in range(self._schedule.group_size))
        return Group(prompt, samples, seconds, f"{self._driver}/rollout-{self._index}")

    def _check(self) -> None:
        if not self.alive:
            raise RayActorError()
        if self._broken:
            raise EngineLostError("the vLLM engine died")

    def _hangs(self) -> bool:
        hang, at = self._schedule.hang, self._schedule.hang_at
        return now() >= at and (hang is Hang.ALL_ACTORS or (hang is Hang.ONE_ACTOR and self._index == 0))

    def _spans(self, times: list[float]) -> tuple[VersionSpan, ...]:
        """Of tokens that were sampled at ``times``."""
        spans: list[VersionSpan] = []
        for token, time in enumerate(times):
            version = [version for since, version in self._versions if since <= time][-1]
            if spans and spans[-1].version == version:
                spans[-1] = VersionSpan(version, spans[-1].start, token + 1)
            else:
                spans.append(VersionSpan(version, token, token + 1))
        return tuple(spans)

    async def catch_up(self, push: StoredPush) -> int:
        """As the real one; the load takes time, and another push may end meanwhile."""
        if self.version < push.version:
            self._check()
            await self._pass(self._chance.uniform(0, self._schedule.pace.push))
            self.load(push.version)
        return self.version

    @property
    def works(self) -> bool:
        return self.alive and not self._broken

    @property
    def version(self) -> int:
        return self._versions[-1][1]

    def load(self, version: int) -> None:
        """Serve ``version`` from now on, in the middle of what is generated."""
        self._versions.append((now(), version))

    async def _pass(self, seconds: float) -> None:
        """Let time pass, unless the actor dies."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._open.add(future)
        if seconds < math.inf:
            loop.call_later(seconds, lambda: future.done() or future.set_result(None))
        await future
        self._open.discard(future)


def _sample(row: int, place: int, spans: tuple[VersionSpan, ...]) -> Sample:
    images = (None, None, final_image(row, place))
    return Sample(IDS, LOGPROBS, SUPPORTS, spans, "stop", sample_chain(place), images)


class Manager:
    """The part of RLlib's ``FaultTolerantActorManager`` that the pool uses."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = dict(enumerate(handles))
        self._healthy = dict.fromkeys(self._handles, True)

    def actors(self) -> dict[int, Handle]:
        return self._handles

    def healthy_actor_ids(self) -> list[int]:
        return [index for index, healthy in self._healthy.items() if healthy]

    def num_healthy_actors(self) -> int:
        return len(self.healthy_actor_ids())

    def is_actor_healthy(self, index: int) -> bool:
        return self._healthy[index]

    def set_actor_state(self, index: int, healthy: bool) -> None:
        self._healthy[index] = healthy

    def probe_unhealthy_actors(self, timeout_seconds: float, mark_healthy: bool) -> list[int]:
        return [i for i, healthy in self._healthy.items() if not healthy and self._handles[i].served.alive]


class SimulatedPool(RolloutPool):
    """The real pool over simulated actors. It gives a prompt up once it fails more often than there are deaths."""

    def __init__(
        self, actors: list[SimulatedActor], store: WeightStore, deaths: int, delay: Callable[[], float]
    ) -> None:
        super().__init__(None, len(actors), start_timeout_s=1e9, max_tries=1 + deaths)
        self._handles = [Handle(actor, delay) for actor in actors]
        self._manager = Manager(self._handles)
        self._outstanding = dict.fromkeys(range(len(actors)), 0)
        self._store = Handle(store, delay)


async def push(version: int, actors: list[SimulatedActor], store: WeightStore, schedule: Schedule, chance: Random):
    """What :class:`actors.weight_sink.ActorWeightSink` does, in simulated time.

    An actor that dies or loses its engine meanwhile, or has when it begins, is left out.
    """
    if store.begin(version, ()) > version:
        return
    lives = [actor.life for actor in actors if actor.alive]
    live = [actor for actor in actors if actor.alive]
    await asyncio.sleep(chance.uniform(0, schedule.pace.push))

    async def finish(actor: SimulatedActor, life: int) -> None:
        await asyncio.sleep(chance.uniform(0, schedule.pace.push))
        if actor.works and actor.life == life:
            actor.load(version)

    await asyncio.gather(*(finish(actor, life) for actor, life in zip(live, lives, strict=True)))
    store.commit({})
