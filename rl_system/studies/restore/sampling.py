"""Who draws: vLLM, or transformers alone. One queue over all tiles of all pictures, started once.

A sampler is what :class:`Sampler` says; :class:`Queue` gives it work, and less at a time when memory runs out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from actors.decoding import Decoding
from actors.errors import EngineLostError
from actors.reference_sampler import ReferenceSampler
from actors.rollout_actor import RolloutActor
from actors.spec import RolloutSpec
from vlcot.groups import Group, Prompt
from vlcot.policy.family import Family


class Sampler(Protocol):
    """Writes groups of chains for prompts, in any order.

    A prompt's chains depend on the prompt, its seed and the sampler's settings, not on what is sampled beside it.
    """

    @property
    def room(self) -> bool:
        """Whether another prompt would be of use now: not enough are open to keep it busy."""

    def submit(self, prompt: Prompt) -> None:
        """Take a prompt."""

    def finished(self) -> Group:
        """Wait for the next group that is done.

        Raises:
            OutOfMemory: memory ran out, or the engine died; all open prompts are lost.
        """

    def close(self) -> None:
        """End engines and their processes."""


class OutOfMemory(RuntimeError):
    """Memory ran out, or an engine died, which says no reason; a smaller batch may do."""


class SamplingFailed(RuntimeError):
    """No sampler can go on."""


class VllmSampler:
    """The rollout actor's engine, in this process and without Ray.

    Args:
        spec: of the actor; ``max_num_seqs`` chains are sampled at the same time, and as many wait.
        decoding: of every prompt; vLLM has no guidance.

    Raises:
        OutOfMemory: the engine did not start.
        ValueError: a checkpoint is missing or is no policy.
    """

    def __init__(self, spec: RolloutSpec, decoding: Decoding) -> None:
        self._decoding = decoding
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.Task[Group]] = set()
        self._most = 2 * max(1, spec.max_num_seqs // spec.group_size)
        try:
            self._actor = RolloutActor(spec, 0)
        except Exception as error:
            self._loop.close()
            if isinstance(error, ValueError) and "memory" not in str(error):
                raise
            raise OutOfMemory(f"the engine did not start: {_first_line(error)}") from error

    @property
    def room(self) -> bool:
        """See :class:`Sampler`."""
        return len(self._open) < self._most

    def submit(self, prompt: Prompt) -> None:
        """See :class:`Sampler`."""
        self._open.add(self._loop.create_task(self._actor.generate(prompt, decoding=self._decoding)))

    def finished(self) -> Group:
        """See :class:`Sampler`."""
        waiting = asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
        done, _ = self._loop.run_until_complete(waiting)
        task = done.pop()
        self._open.discard(task)
        try:
            return task.result()
        except EngineLostError as error:
            raise OutOfMemory(f"{error} (its own message stands above; most often memory ran out)") from error
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise OutOfMemory(_first_line(error)) from error

    def close(self) -> None:
        """See :class:`Sampler`."""
        for task in self._open:
            task.cancel()
        if self._open:
            self._loop.run_until_complete(asyncio.wait(self._open))
        self._actor.shutdown()
        self._loop.run_until_complete(asyncio.sleep(0.1))  # lets vLLM's own tasks end before their loop does
        self._loop.close()


class TransformersSampler:
    """The same distribution with transformers alone: guidance, small machines, devices that this vLLM is not built
    for. Prompts are sampled in batches that end together. Equal seeds give other chains than vLLM's.

    Args:
        spec: ``max_num_seqs`` chains are one batch.
        device: of policy and image tokenizer.
        decoding: of every prompt.
    """

    def __init__(self, spec: RolloutSpec, device: str, decoding: Decoding) -> None:
        import torch

        from vlcot.policy.model import VlcotForCausalLM
        from vlcot.tokenizer.image import ImageTokenizer

        torch.set_num_threads(spec.threads)
        model = VlcotForCausalLM.from_pretrained(spec.policy, dtype=getattr(torch, spec.dtype)).to(device)
        self._sampler = ReferenceSampler(
            model,
            Family.from_pretrained(spec.policy),
            ImageTokenizer.from_pretrained(spec.image_tokenizer, device),
            group_size=spec.group_size,
            temperature=spec.temperature,
            max_new_tokens=spec.max_new_tokens,
            seed=spec.seed,
        )
        self._decoding = decoding
        self._most = max(1, spec.max_num_seqs // spec.group_size)
        self._open: deque[Prompt] = deque()
        self._done: deque[Group] = deque()

    @property
    def room(self) -> bool:
        """See :class:`Sampler`."""
        return len(self._open) < self._most

    def submit(self, prompt: Prompt) -> None:
        """See :class:`Sampler`."""
        self._open.append(prompt)

    def finished(self) -> Group:
        """See :class:`Sampler`."""
        try:
            if not self._done:
                batch = [self._open.popleft() for _ in range(min(self._most, len(self._open)))]
                self._done.extend(self._sampler.generate_batch(batch, [self._decoding] * len(batch)))
            return self._done.popleft()
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise OutOfMemory(_first_line(error)) from error

    def close(self) -> None:
        """See :class:`Sampler`."""
        del self._sampler


class Queue:
    """A sampler that is started anew with a quarter of the batch whenever it runs out of memory.

    Args:
        start: makes a sampler of so many chains at a time.
        batch: to begin with.
        say: told what was changed, for the user.
    """

    def __init__(self, start: Callable[[int], Sampler], batch: int, say: Callable[[str], None]) -> None:
        self._start = start
        self.batch = batch
        self._say = say
        self._sampler: Sampler | None = None
        self._open: dict[str, Prompt] = {}

    @property
    def room(self) -> bool:
        """Whether another prompt would be of use now; starts the sampler. Raises SamplingFailed."""
        return self._running().room

    def submit(self, prompt: Prompt) -> None:
        """Take a prompt. Raises SamplingFailed: there is no sampler, with any batch."""
        sampler = self._running()
        self._open[prompt.group_id] = prompt
        sampler.submit(prompt)

    def finished(self) -> Group | None:
        """The next group that is done; None if no prompt is open.

        Raises:
            SamplingFailed: memory does not hold a single chain, or the engine dies whatever the batch.
        """
        while self._open:
            try:
                group = self._running().finished()
            except OutOfMemory as error:
                self._shrink(error)
                continue
            del self._open[group.prompt.group_id]
            return group
        return None

    def close(self) -> None:
        """End the sampler, if there is one."""
        if self._sampler is not None:
            sampler, self._sampler = self._sampler, None
            sampler.close()

    def _running(self) -> Sampler:
        while self._sampler is None:
            try:
                self._sampler = self._start(self.batch)
            except OutOfMemory as error:
                self._shrink(error)
            else:
                for prompt in self._open.values():
                    self._sampler.submit(prompt)
        return self._sampler

    def _shrink(self, error: OutOfMemory) -> None:
        self.close()
        if self.batch == 1:
            raise SamplingFailed(f"{error}; nothing smaller is left than one tile at a time") from error
        self.batch = max(1, self.batch // 4)
        self._say(f"{error}; going on with --batch {self.batch}")


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in a class on CUDA and in words on a CPU."""
    import torch

    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in words


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
