"""How ids are chosen when a policy is used, not trained: guidance inside images, and top-k.

Order, as in PURE: guidance, then the grammar's mask, then top-k, then temperature. Each function takes logits whose
forbidden ids are -inf or left out. A rollout for training uses none of this but the temperature: the learner's
log-probs are those of the whole support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlcot.grammar import Support

EXTRA_ARG = "vlcot_top_k"
"""Key of :meth:`Decoding.extra_args` in vLLM's ``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class EntropyTopK:
    """k = round(smallest + (largest - smallest) * sigmoid(H - midpoint)), H the entropy in nats, at most max_entropy.

    The defaults are PURE's (``inference_solver.py``): 14 ids at H = 0, 1,000 at 5, 1,987 at 10. The same number for
    ``smallest`` and ``largest`` is a plain top-k.

    Raises:
        ValueError: not 1 <= smallest <= largest, or a midpoint or max_entropy that is no number.
    """

    smallest: int = 1
    largest: int = 2000
    midpoint: float = 5.0
    max_entropy: float = 10.0

    def __post_init__(self) -> None:
        whole = all(isinstance(k, int) and not isinstance(k, bool) for k in (self.smallest, self.largest))
        if not whole or not 1 <= self.smallest <= self.largest:
            raise ValueError(f"top-k must be whole and from 1 up, got {self.smallest!r} to {self.largest!r}")
        if not abs(self.midpoint) < float("inf") or not 0 <= self.max_entropy < float("inf"):
            raise ValueError(f"top-k with midpoint {self.midpoint} and max_entropy {self.max_entropy} has no meaning")

    def k(self, entropy: torch.Tensor) -> torch.Tensor:
        """int64 [N]; float ``entropy`` [N] in nats."""
        share = torch.sigmoid(entropy.double().clamp(0.0, self.max_entropy) - self.midpoint)
        return (self.smallest + (self.largest - self.smallest) * share).round().long()


@dataclass(frozen=True)
class Decoding:
    """Settings of one request. The defaults sample the policy as it is.

    Attributes:
        temperature: logits are divided by it at the end.
        guidance: s of :func:`guided`, for image codes only; 1 is off. Not in vLLM (docs/decoding.md).
        image_top_k: of image codes; None keeps all.
        text_top_k: of text; None keeps all, 1 is greedy.

    Raises:
        ValueError: a number outside of its range, by name.
    """

    temperature: float = 1.0
    guidance: float = 1.0
    image_top_k: EntropyTopK | None = None
    text_top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be 0 or more (1 is off), got {self.guidance}")
        if self.text_top_k is not None:
            EntropyTopK(self.text_top_k, self.text_top_k)

    @property
    def is_guided(self) -> bool:
        """Whether image codes need the unconditional logits."""
        return self.guidance != 1.0

    def top_k(self, support: Support) -> EntropyTopK | None:
        """Which top-k ids of ``support`` are cut by."""
        if support is Support.CODE:
            return self.image_top_k
        if support is Support.FORCED or self.text_top_k is None:
            return None
        return EntropyTopK(self.text_top_k, self.text_top_k)

    def extra_args(self) -> dict[str, Any] | None:
        """Both top-k for vLLM's ``SamplingParams.extra_args``, None if there is none. Temperature has its own field."""
        if self.image_top_k is None and self.text_top_k is None:
            return None
        image = None if self.image_top_k is None else asdict(self.image_top_k)
        return {EXTRA_ARG: {"image_top_k": image, "text_top_k": self.text_top_k}}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Decoding | None:
        """What :meth:`extra_args` wrote; None where it wrote nothing.

        Raises:
            ValueError: something else under its key.
        """
        given = (extra_args or {}).get(EXTRA_ARG)
        if given is None:
            return None
        try:
            image = given["image_top_k"]
            return cls(image_top_k=image and EntropyTopK(**image), text_top_k=given["text_top_k"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"extra_args[{EXTRA_ARG!r}] is not what Decoding.extra_args writes: {given!r}") from error


PURE = Decoding(temperature=0.9, guidance=0.8, image_top_k=EntropyTopK(), text_top_k=1)
"""Settings of PURE's and the authors' inference. 20 % of the unconditional logits are mixed in; text is greedy."""


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, u + scale * (c - u); logits of one shape. ``scale`` 1 gives c, 0 gives u."""
    return torch.lerp(unconditional, conditional, scale)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, [N], of softmax(logits [N, V]); ids at -inf add nothing."""
    logprobs = logits.log_softmax(-1)
    return torch.special.entr(logprobs.exp()).sum(-1)


def keep_top(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Set all but the ``k`` [N] largest of each row of ``logits`` [N, V] to -inf, in place; ties with the last stay."""
    places = (k - 1).clamp(max=logits.shape[1] - 1)
    largest = logits.topk(int(places.max()) + 1).values
    return logits.masked_fill_(logits < largest.gather(1, places[:, None]), float("-inf"))


def truncate(logits: torch.Tensor, top_k: EntropyTopK | None) -> torch.Tensor:
    """Cut each row of ``logits`` [N, V] to its top-k, in place."""
    if top_k is None or not len(logits):
        return logits
    if top_k.smallest == top_k.largest:
        return keep_top(logits, torch.full((len(logits),), top_k.largest, device=logits.device))
    return keep_top(logits, top_k.k(entropy(logits)))
