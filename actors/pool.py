"""The rollout pool: Ray actors, watched by RLlib's ``FaultTolerantActorManager``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from actors.errors import EngineLostError, StaleWeightsError
from actors.nodes import offered, said
from actors.push import StoredPush
from actors.push_group import PushBackend
from actors.rollout_actor import RolloutActor, process_environment
from actors.spec import RolloutSpec
from actors.weight_sink import ActorWeightSink
from actors.weight_store import WeightStore
from vlcot.groups import Group, Prompt

if TYPE_CHECKING:
    from ray.rllib.utils.actor_manager import FaultTolerantActorManager

PROBE_S = 2.0
DEFAULT_RESOURCES = {"CPU": 1.0}


class RolloutPool:
    """Several rollout actors behind one ``generate``.

    An actor that dies is restarted by Ray; its prompts are given to another actor, with the same seed. It
    serves again only when it holds the last committed weights. Use from one event loop.

    Args:
        spec: of every actor.
        num_actors: how many.
        resources: Ray resources of one actor, e.g. ``{"CPU": 1, "GPU": 1}``.
        start_timeout_s: to place the actors and start their engines; also to wait for a restarted one.
        max_tries: actors that may fail on one prompt before ``generate`` raises.
        labels: of the nodes that may hold the actors; none: any node.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        num_actors: int,
        resources: Mapping[str, float] | None = None,
        start_timeout_s: float = 300.0,
        max_tries: int = 3,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        if num_actors < 1 or max_tries < 1:
            raise ValueError(f"num_actors and max_tries must be positive, got {num_actors} and {max_tries}")
        self._spec = spec
        self._num_actors = num_actors
        self._resources = dict(DEFAULT_RESOURCES if resources is None else resources)
        self._start_timeout_s = start_timeout_s
        self._max_tries = max_tries
        self._labels = dict(labels or {})
        self._handles: list[ActorHandle] = []
        self._outstanding: dict[int, int] = {}
        self._failures = 0
        self._ready: list[dict[str, Any]] = []
        self._restoring: asyncio.Task[None] | None = None
        self._manager: FaultTolerantActorManager
        self._store: ActorHandle

    # --- life -------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Create the actors; their engines start by themselves.

        Raises:
            ValueError: the cluster has not the resources, or no node with the labels.
        """
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        _check_resources(self._num_actors, self._resources, self._labels)
        store_class: Any = ray.remote(num_cpus=0)(WeightStore)
        self._store = store_class.remote()
        self._handles = [self._create(index) for index in range(self._num_actors)]
        self._manager = FaultTolerantActorManager(self._handles)
        self._outstanding = dict.fromkeys(self._manager.actor_ids(), 0)

    def start(self) -> None:
        """Create the actors, if that was not done, and wait until every engine answers (blocking).

        Raises:
            ValueError: as :meth:`create`, or a checkpoint is missing.
            TimeoutError: the actors were not ready in time.
        """
        if not self._handles:
            self.create()
        try:
            self._ready = ray.get([h.ready.remote() for h in self._handles], timeout=self._start_timeout_s)
        except GetTimeoutError as error:
            self.stop()
            raise TimeoutError(
                f"rollout actors were not ready after {self._start_timeout_s:.0f} s; each needs {self._resources}"
                f"{_on(self._labels)}, "
                f"free now in the whole cluster: {_only(ray.available_resources(), self._resources)}"
            ) from error
        except RayActorError as error:
            self.stop()
            raise ValueError(f"a rollout actor could not start: {error}") from error

    def _create(self, index: int) -> ActorHandle:
        others = {name: amount for name, amount in self._resources.items() if name not in ("CPU", "GPU")}
        options = {
            "num_cpus": self._resources.get("CPU", 0),
            "num_gpus": self._resources.get("GPU", 0),
            "resources": others,
            "label_selector": self._labels,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 1000,
            "runtime_env": {"env_vars": process_environment(self._spec)},
        }
        actor_class: Any = ray.remote(RolloutActor)
        return actor_class.options(**options).remote(self._spec, index)

    def stop(self) -> None:
        """End all actors and their engines; a second call does nothing."""
        if self._restoring is not None:
            self._restoring.cancel()
        if not self._handles:
            return
        ray.wait([h.shutdown.remote() for h in self._handles], num_returns=len(self._handles), timeout=15)
        for handle in (*self._handles, self._store):
            ray.kill(handle)
        self._handles = []

    # --- use --------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt) -> Group:
        """The group of ``prompt``, from the healthy actor with the fewest open prompts.

        Raises:
            RuntimeError: ``max_tries`` actors failed on it, or none was healthy for ``start_timeout_s``.
            ValueError: the prompt is too long.
        """
        reasons: list[str] = []
        while len(reasons) < self._max_tries:
            actor_id = await self._healthy_actor()
            handle = self._manager.actors()[actor_id]
            version = await self._store.version.remote()
            self._outstanding[actor_id] += 1
            try:
                return await handle.generate.remote(prompt, version)
            except StaleWeightsError as error:
                self._failed(actor_id, error)  # restarted while it was idle: no fault of the prompt
            except (RayActorError, EngineLostError) as error:
                self._failed(actor_id, error)
                cause = getattr(error, "cause", error)  # RayTaskError carries the actor's own exception
                reasons.append(f"actor {actor_id}: {type(cause).__name__}: {str(cause).splitlines()[0]}")
            finally:
                self._outstanding[actor_id] -= 1
        raise RuntimeError(f"prompt {prompt.row_id} failed on {self._max_tries} actors: {'; '.join(reasons)}")

    def handles(self) -> list[ActorHandle]:
        """Handles of all actors; they stay valid over restarts."""
        return list(self._handles)

    def weight_sink(self, backend: PushBackend = "object_store") -> ActorWeightSink:
        """Where the learner sends weights for this pool, and how (picklable)."""
        return ActorWeightSink(self._handles, self._store, backend=backend)

    def ready_info(self) -> list[dict[str, Any]]:
        """What each actor said when it was ready (:meth:`RolloutActor.ready`)."""
        return list(self._ready)

    def load(self) -> dict[int, tuple[bool, int]]:
        """By actor: whether it serves, and how many prompts it has."""
        return {i: (self._manager.is_actor_healthy(i), open_) for i, open_ in self._outstanding.items()}

    async def served_checksums(self) -> dict[str, int]:
        """XXH3 per tensor of the last committed push, which every actor has verified; empty before the first."""
        push: StoredPush | None = await self._store.latest.remote()
        return dict(push.checksums) if push else {}

    async def statistics(self) -> dict[str, Any]:
        """``actors`` and ``healthy`` counts, ``failures`` so far, ``outstanding`` prompts, ``per_actor``:
        :meth:`RolloutActor.statistics` of the healthy ones by index."""
        healthy = self._manager.healthy_actor_ids()
        replies = await asyncio.gather(
            *(self._manager.actors()[i].statistics.remote() for i in healthy), return_exceptions=True
        )
        for actor_id, reply in zip(healthy, replies, strict=True):
            if isinstance(reply, RayActorError):
                self._failed(actor_id, reply)
            elif isinstance(reply, BaseException):
                raise reply
        return {
            "actors": self._num_actors,
            "healthy": self._manager.num_healthy_actors(),
            "failures": self._failures,
            "outstanding": sum(self._outstanding.values()),
            "per_actor": {i: r for i, r in zip(healthy, replies, strict=True) if isinstance(r, dict)},
        }

    # --- faults -----------------------------------------------------------------------------------------

    def _failed(self, actor_id: int, error: Exception) -> None:
        if self._manager.is_actor_healthy(actor_id):
            self._failures += 1
            self._manager.set_actor_state(actor_id, healthy=False)
            if isinstance(error, EngineLostError):
                ray.kill(self._manager.actors()[actor_id], no_restart=False)
        if self._restoring is None or self._restoring.done():
            self._restoring = asyncio.create_task(self._restore())

    async def _healthy_actor(self) -> int:
        deadline = time.monotonic() + self._start_timeout_s
        while not (healthy := self._manager.healthy_actor_ids()):
            if self._restoring is not None and self._restoring.done() and (error := self._restoring.exception()):
                raise RuntimeError(f"no rollout actor could be restored: {error}") from error
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rollout actor was healthy for {self._start_timeout_s:.0f} s")
            await asyncio.sleep(0.1)
        return min(healthy, key=self._outstanding.__getitem__)

    async def _restore(self) -> None:
        """Probe the unhealthy actors until all serve again, each with the last committed weights."""
        while self._manager.num_healthy_actors() < self._num_actors:
            # Not mark_healthy=True: an actor that answers still has the weights on disk.
            answering = await asyncio.to_thread(self._manager.probe_unhealthy_actors, PROBE_S, False)
            for actor_id in answering:
                push: StoredPush | None = await self._store.latest.remote()
                try:
                    if push is not None:
                        await self._manager.actors()[actor_id].catch_up.remote(push)
                    self._manager.set_actor_state(actor_id, healthy=True)
                except EngineLostError:
                    ray.kill(self._manager.actors()[actor_id], no_restart=False)
                except RayActorError:
                    continue  # died again: stays unhealthy and is probed again
            await asyncio.sleep(0.1)


def _check_resources(num_actors: int, per_actor: Mapping[str, float], labels: Mapping[str, str]) -> None:
    total = offered(labels)
    where = f"the nodes with {said(labels)} have" if labels else "the whole cluster has"
    for name, amount in per_actor.items():
        if num_actors * amount > total.get(name, 0.0):
            raise ValueError(
                f"{num_actors} rollout actors with {amount:g} {name} each need {num_actors * amount:g} {name}; "
                f"{where} {total.get(name, 0.0):g}"
            )


def _on(labels: Mapping[str, str]) -> str:
    return f" on a node with {said(labels)}" if labels else ""


def _only(resources: Mapping[str, float], names: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in names}
