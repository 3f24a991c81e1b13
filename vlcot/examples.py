"""One example of the cold start: a question and its whole VLCoT as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlcot.images import area_downscale, upscale_for_policy
from vlcot.sequence import SequenceBuilder
from vlcot.tokenizer.image import ImageTokenizer


@dataclass(frozen=True, eq=False)
class ChainExample:
    """Ids and codes of one example.

    Attributes:
        prompt: int32 [P], the question.
        answer: int32 [A], the VLCoT ending with the turn end.
        lr_codes: int64 [h, w] of the LR image at full size.
        codes: int64 [h, w] of the target at each of the layout's sizes.
    """

    prompt: np.ndarray
    answer: np.ndarray
    lr_codes: np.ndarray
    codes: tuple[np.ndarray, ...]


def chain_examples(
    instruction: str,
    lr: Sequence[np.ndarray],
    hq: Sequence[np.ndarray],
    texts: Sequence[Sequence[str]],
    builder: SequenceBuilder,
    images: ImageTokenizer,
) -> list[ChainExample]:
    """Examples of equal sizes, encoded in one batch; every image is tokenised at its own size.

    Args:
        lr, hq: uint8 [s/4, s/4, 3] and [s, s, 3] RGB, s the full size of the layout.
        texts: degradation, coarse, middle and fine text of each.

    Raises:
        ValueError: an image or text that the sequence cannot hold.
    """
    size = builder.layout.full_size
    lr_codes = images.encode(np.stack([upscale_for_policy(image, size) for image in lr])).numpy(force=True)
    targets = [
        images.encode(np.stack([area_downscale(image, side) for image in hq])).numpy(force=True)
        for side in builder.layout.image_sizes
    ]
    examples = []
    for i, said in enumerate(texts):
        codes = tuple(of_size[i] for of_size in targets)
        prompt = builder.prompt(instruction, lr_codes[i])
        examples.append(ChainExample(prompt, builder.chain(said, codes), lr_codes[i], codes))
    return examples
