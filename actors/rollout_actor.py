"""The rollout actor: a vLLM engine that writes groups of chains and takes new weights in flight.

Weights and caches. A push pauses generation, loads, and resumes. Running requests go on with the key/value
blocks that the old weights wrote, and their version spans say which weights sampled which ids; or, where
``spec.on_push`` is ``restart``, they begin again and never meet old blocks. Blocks are shared by the samples of one
group and by nothing else (prompts of different images share only a few ids anyway); without ``restart`` a sample that
waited in vLLM's queue during a push reads the prompt's blocks as its siblings wrote them before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from actors.decoding import Decoding
from actors.errors import EngineLostError, PushLostError, StaleWeightsError
from actors.push import IncomingPush, LoadReport, StoredPush
from actors.push_group import PushGroup, Seat, receive_all
from actors.samples import build_samples
from actors.sampling import Sampled, sample_group
from actors.spec import RolloutSpec
from actors.vllm_plugin import GRAMMAR_PROCESSOR, WEIGHT_TRANSFER_BACKEND
from vlcot.groups import Group, Prompt
from vlcot.policy.family import Family
from vlcot.weights import Bucket

LOG = logging.getLogger(__name__)
PAUSE_MODES = {"continue": "keep", "restart": "abort"}
"""vLLM's name of what :attr:`actors.spec.RolloutSpec.on_push` asks for."""
KV_BLOCK = 32
"""Ids per key/value block: vLLM's CPU attention wants multiples of 32; small, so that short prompts are shared."""


def process_environment(spec: RolloutSpec) -> dict[str, str]:
    """Environment that vLLM and its child processes need; must be set before they are imported."""
    return {
        "OMP_NUM_THREADS": str(spec.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores; binding would stack them on one
        # With one rank the engine's process works itself, as on a GPU; else the CPU platform starts another for that.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # the CPU worker does not leave by itself
        # vLLM compiles a helper of the sampler even when eager: some seconds of g++ at the first token
        "TORCHDYNAMO_DISABLE": "1" if spec.enforce_eager else "0",
    }


class RolloutActor:
    """Samples groups with vLLM. Plain class; :mod:`actors.pool` makes it a Ray actor.

    Args:
        spec: settings.
        index: of the replica; its engine's seed is ``spec.seed + index``.

    Raises:
        ValueError: a checkpoint is missing or is no VLCoT policy.
    """

    def __init__(self, spec: RolloutSpec, index: int) -> None:
        spec.check_paths()
        os.environ.update(process_environment(spec))
        import torch

        from vlcot.tokenizer.image import ImageTokenizer

        torch.set_num_threads(spec.threads)
        self.name = f"rollout-{index}"
        self._spec = spec
        self._family = Family.from_pretrained(spec.policy)
        self._builder = self._family.builder
        self._decoder = ImageTokenizer.from_pretrained(spec.image_tokenizer)
        self._engine_seed = spec.seed + index
        self._engine = _start_engine(spec, self._engine_seed)
        self._version = 0
        self._pushes: dict[int, IncomingPush] = {}
        self._process = uuid.uuid4().hex
        self._group: PushGroup | None = None
        self._loading = asyncio.Lock()
        self._prepared = False
        self._broken = ""
        self._requests = 0
        self._clock = _BusyClock()
        self._totals = dict.fromkeys(
            ("tokens", "groups", "discarded_tokens", "cached_prompt_tokens", "pushes", "paused_s"), 0.0
        )

    # --- life -------------------------------------------------------------------------------------------

    def ping(self) -> str:
        """Answer of a live actor (``FaultTolerantActorManager`` probes with it)."""
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``func`` with this actor (``FaultTolerantActorManager``'s contract)."""
        return func(self, *args, **kwargs)

    async def ready(self) -> dict[str, Any]:
        """Wait for the engine; versions of the engines as imported here, process id, seed, weight version."""
        import ray
        import torch
        import vllm

        version = await self._served()
        return {
            "actor": self.name,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
            "pid": os.getpid(),
            "seed": self._engine_seed,
            "weight_version": version,
        }

    async def _served(self) -> int:
        """The version of the weights, once none are being loaded and vLLM knows which these are.

        Raises:
            EngineLostError: the engine is dead, or a push broke its weights.
        """
        async with self._loading:
            if self._broken:
                raise EngineLostError(f"{self.name}: {self._broken}")
            if not self._prepared:
                await self._engine.update_weight_version(str(self._version))
                self._prepared = True
            return self._version

    def shutdown(self) -> None:
        """End the engine and its processes."""
        if self._group is not None:
            self._group.close()
        for push in self._pushes.values():
            push.discard()
        self._engine.shutdown()
        del self._engine  # its finaliser fails once the interpreter is closing

    async def statistics(self) -> dict[str, float]:
        """Totals since the start: ``tokens`` of the ``groups`` made, ``discarded_tokens`` of chains that a push made
        begin again, ``cached_prompt_tokens``, ``busy_s`` (at least one request was open), ``paused_s`` (of it paused
        for weights), ``pushes``; and ``weight_version``."""
        return {**self._totals, "busy_s": self._clock.seconds(), "weight_version": self._version}

    # --- generation -------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, minimum_version: int = 0, decoding: Decoding | None = None) -> Group:
        """Sample the G chains of ``prompt``, reproducible from prompt, seed and weights.

        Args:
            minimum_version: weights older than this must not be used.
            decoding: temperature and top-k of this request, for use; None for training, which is the spec's
                temperature and all ids that the grammar allows.

        Raises:
            StaleWeightsError: the actor's weights are older than ``minimum_version``.
            EngineLostError: the engine is dead, or a push broke its weights.
            ValueError: the prompt leaves no room for ``max_new_tokens``, or ``decoding`` asks for guidance.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        decoding = decoding or Decoding(temperature=self._spec.temperature)
        if decoding.is_guided:
            raise ValueError("guidance needs pairs of rows in lock-step, which vLLM has not: use the reference sampler")
        if (version := await self._served()) < minimum_version:
            raise StaleWeightsError(f"{self.name} has weights {version}, {minimum_version} is asked for")
        room = self._engine.model_config.max_model_len - len(prompt.ids)
        if room < self._spec.max_new_tokens:
            raise ValueError(
                f"prompt {prompt.row_id} of {len(prompt.ids)} ids leaves {max(room, 0)} of the policy's positions, "
                f"but rollout.max_new_tokens is {self._spec.max_new_tokens}"
            )
        started = time.perf_counter()
        with self._clock:
            try:
                sampled = await self._sample(prompt, decoding)
            except EngineDeadError as error:
                raise self._lost("the vLLM engine died") from error
        samples = await asyncio.to_thread(build_samples, self._builder, self._decoder, sampled.samples)
        self._totals["tokens"] += sum(len(sample.ids) for sample in samples)
        self._totals["groups"] += 1
        self._totals["cached_prompt_tokens"] += sampled.cached_prompt_tokens
        self._totals["discarded_tokens"] += sampled.discarded_tokens
        LOG.info("%s: generated %d samples", self.name, len(samples), extra={"group_id": prompt.group_id})
        return Group(prompt, samples, time.perf_counter() - started, self.name, sampled.discarded_tokens)

    async def _sample(self, prompt: Prompt, decoding: Decoding) -> Sampled:
        self._requests += 1
        name, turn_end = f"{prompt.group_id}-{self._requests}", self._family.vocabulary.turn_end
        return await sample_group(self._engine, self._spec, prompt, decoding, turn_end, name, self._served)

    def _lost(self, reason: str) -> EngineLostError:
        self._broken = reason
        return EngineLostError(f"{self.name}: {reason}")

    # --- weights ----------------------------------------------------------------------------------------

    async def begin(self, version: int, layout: Sequence[Bucket]) -> str:
        """Expect a push of ``version``; an earlier, unfinished one of that version is dropped.

        Returns:
            A name of this process: another one after a restart.
        """
        if old := self._pushes.pop(version, None):
            old.discard()
        self._pushes[version] = IncomingPush(version, layout)
        return self._process

    async def take(self, version: int, seat: Seat | None) -> None:
        """:meth:`receive` all buckets of push ``version`` as they are broadcast; generation goes on.

        Args:
            seat: in a new push group; None: in the present one.

        Raises:
            PushLostError: the push was not begun in this process, the group broke or was not formed in time.
        """
        push = self._push(version)
        try:
            if seat is not None:
                if self._group is not None:
                    self._group.close()
                self._group = None
                self._group = await asyncio.to_thread(PushGroup, seat)
            await asyncio.to_thread(receive_all, self._group, push)
        except BaseException:
            if self._pushes.get(version) is push:  # it may have been begun anew meanwhile
                del self._pushes[version]
            push.discard()
            raise

    async def receive(self, version: int, index: int, data: np.ndarray) -> None:
        """Take bucket ``index`` (uint8) of push ``version``; generation goes on.

        Raises:
            PushLostError: the push was not begun in this process.
        """
        await asyncio.to_thread(self._push(version).write, index, data)

    async def fetch(self, version: int, index: int, stored: Sequence[Any]) -> None:
        """:meth:`receive` what lies in the object store; ``stored`` is its reference, in a list."""
        await self.receive(version, index, await stored[0])

    async def finish(self, version: int, checksums: Mapping[str, int]) -> LoadReport:
        """Compare what arrived, pause, load, compare what was loaded, serve ``version``, resume.

        Raises:
            PushLostError: the push was not begun in this process, or a bucket is missing.
            EngineLostError: the engine is dead.
            RuntimeError: a checksum differs, with the tensor's name. If it differs on arrival the old weights
                go on serving; after loading, the actor stays paused and refuses to generate.
        """
        push = self._push(version)
        try:
            arrived = push.check(checksums)
            async with self._loading:
                seconds = await self._load(push)
            report = LoadReport(version, arrived, push.loaded(), {**push.seconds(), **seconds})
        except ValueError as error:
            raise RuntimeError(f"{self.name} refused weights {version}: {error}") from error
        finally:
            del self._pushes[version]
            push.discard()
        self._totals["pushes"] += 1
        return report

    async def _load(self, push: IncomingPush) -> dict[str, float]:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
        from vllm.v1.engine.exceptions import EngineDeadError

        started = time.perf_counter()
        try:
            # pause_generation() would add 20 ms of sleep, for outputs of ended requests that nothing here waits for.
            await self._engine.engine_core.pause_scheduler_async(PAUSE_MODES[self._spec.on_push], clear_cache=False)
            paused = time.perf_counter()
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(push.update_info()))
            await self._engine.finish_weight_update(weight_version=str(push.version))
        except EngineDeadError as error:
            raise self._lost("the vLLM engine died") from error
        except Exception as error:
            self._broken = f"loading weights {push.version} failed: {error}"
            raise RuntimeError(f"{self.name}: {self._broken}") from error
        self._version = push.version
        self._prepared = True
        resuming = time.perf_counter()
        await self._engine.resume_generation()
        done = time.perf_counter()
        self._totals["paused_s"] += done - started
        LOG.info("%s: loaded weights in %.2f s", self.name, done - started, extra={"step": push.version})
        return {"pause": paused - started, "load": resuming - paused, "resume": done - resuming}

    async def catch_up(self, push: StoredPush) -> int:
        """Take a stored push unless the actor already has it or a later one. Returns the version served."""
        if self._version < push.version:
            await self.begin(push.version, push.layout)
            for index, bucket in enumerate(push.buckets):
                await self.fetch(push.version, index, [bucket])
            await self.finish(push.version, push.checksums)
        return self._version

    def _push(self, version: int) -> IncomingPush:
        if version not in self._pushes:
            raise PushLostError(f"{self.name} was not told of push {version}")
        return self._pushes[version]


class _BusyClock:
    """Wall time during which at least one ``with`` block is open."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._total = 0.0

    def __enter__(self) -> None:
        if self._open == 0:
            self._since = time.perf_counter()
        self._open += 1

    def __exit__(self, *_: object) -> None:
        self._open -= 1
        if self._open == 0:
            self._total += time.perf_counter() - self._since

    def seconds(self) -> float:
        """Total so far, an open block included."""
        return self._total + (time.perf_counter() - self._since if self._open else 0.0)


def _start_engine(spec: RolloutSpec, seed: int) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vlcot.policy.family import read_config

    positions = int(read_config(spec.policy)["max_position_embeddings"])
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=spec.policy,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no sampling defaults from the checkpoint
            dtype=cast(Any, spec.dtype),
            seed=seed,
            max_model_len=positions,
            max_num_seqs=spec.max_num_seqs,
            # vLLM rewinds a seeded request's generator after a partial prefill, which CPU generators cannot do
            # (gpu_model_runner: set_offset): prompts are prefilled whole.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(positions, 2048),
            block_size=KV_BLOCK,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=None if spec.kv_cache_gib is None else int(spec.kv_cache_gib * 2**30),
            gpu_memory_utilization=spec.gpu_memory_utilization,
            tensor_parallel_size=spec.tensor_parallel_size,
            enforce_eager=spec.enforce_eager,
            logprobs_mode="processed_logprobs",
            logits_processors=[GRAMMAR_PROCESSOR],
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER_BACKEND),
            disable_log_stats=True,
        )
    )
