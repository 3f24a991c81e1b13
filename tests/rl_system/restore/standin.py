"""A sampler that copies what it is shown, and a writer without image tokenizer, for tests of everything around them.

The real ones are in ``test_restore_command.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rl_system.studies.restore.sampling import OutOfMemory
from vlcot.grammar import Support
from vlcot.groups import Group, Prompt, Sample, VersionSpan
from vlcot.images import area_downscale
from vlcot.sequence import ParsedChain

SIDE = 64
TOKENS = 10


class StandInWriter:
    """Prompts that hold the view and nothing else."""

    side = SIDE

    def prompt(self, group_id: str, seed: int, view: np.ndarray) -> Prompt:
        assert view.shape == (SIDE, SIDE, 3) and view.dtype == np.uint8
        return Prompt(group_id, group_id, seed, np.zeros(3, np.int32), view, "")


class StandInSampler:
    """Draws ``draw(view, seed, sample number)``; ``fails(prompt, sample number)`` breaks a chain.

    Args:
        dies_after: groups that are finished before memory runs out; None: never.
    """

    def __init__(
        self,
        samples: int = 1,
        batch: int = 8,
        draw: Callable[[np.ndarray, int, int], np.ndarray] = lambda view, seed, number: view,
        fails: Callable[[Prompt, int], bool] = lambda prompt, number: False,
        dies_after: int | None = None,
    ) -> None:
        self._samples, self._batch, self._draw, self._fails, self._left = samples, batch, draw, fails, dies_after
        self._open: list[Prompt] = []
        self.prompts: list[Prompt] = []
        self.most_open = 0
        self.closed = False

    @property
    def room(self) -> bool:
        return len(self._open) < self._batch

    def submit(self, prompt: Prompt) -> None:
        self._open.append(prompt)
        self.prompts.append(prompt)
        self.most_open = max(self.most_open, len(self._open))

    def finished(self) -> Group:
        if self._left == 0:
            raise OutOfMemory("no memory is left")
        self._left = None if self._left is None else self._left - 1
        prompt = self._open.pop()  # any order will do
        samples = tuple(self._sample(prompt, number) for number in range(self._samples))
        return Group(prompt, samples, 0.0, "stand-in")

    def close(self) -> None:
        self.closed = True

    def _sample(self, prompt: Prompt, number: int) -> Sample:
        final = self._draw(prompt.lr_image, prompt.seed, number)
        images = area_downscale(final, SIDE // 4), area_downscale(final, SIDE // 2), final
        broken = self._fails(prompt, number)
        codes = (np.zeros((1, 1), np.int64),) * 3
        chain = ParsedChain("blur", "a cat", "a gray cat", "a gray cat sits", codes, ("broken",) if broken else ())
        supports = np.full(TOKENS, Support.CODE, np.uint8)
        logprobs = np.full(TOKENS, -1.0 - number, np.float32)
        return Sample(
            np.zeros(TOKENS, np.int32), logprobs, supports, (VersionSpan(0, 0, TOKENS),), "stop", chain, images
        )
