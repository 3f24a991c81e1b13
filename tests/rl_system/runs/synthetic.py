"""Groups and evaluations on real photographs, as a run would hand them over."""

from __future__ import annotations

import numpy as np
from PIL import Image

from rl_system.runs.evaluated import EvaluatedPrompt
from toy.photographs import Captions, Split, crop
from vlcot.groups import Absent, Failed, Group, Prompt, Sample, Score, Scored, ScoredGroup, VersionSpan
from vlcot.sequence import ParsedChain

HOSTILE = "<script>alert('model text')</script> a cat & a cup"


def resized(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def photographed(index: int, split: Split, side: int) -> tuple[np.ndarray, Captions]:
    """uint8 [side, side, 3] crop of a photograph, and its captions."""
    cropped = crop(index, split, size=64)
    return resized(cropped.image, side), cropped.captions


def chain(texts: tuple[str | None, ...], errors: tuple[str, ...] = ()) -> ParsedChain:
    return ParsedChain(*texts, images=(None, None, None), errors=errors)


def sample(hq: np.ndarray, texts: tuple[str | None, ...], noise: float, seed: int, final: bool = True) -> Sample:
    rng = np.random.default_rng(seed)

    def restored(side: int) -> np.ndarray:
        noisy = resized(resized(hq, side // 2), side) + rng.normal(0, noise, (side, side, 3))
        return noisy.clip(0, 255).astype(np.uint8)

    side = hq.shape[0]
    images = (restored(side // 4), restored(side // 2), restored(side) if final else None)
    errors = () if final else ("<final_image> does not stand exactly once",)
    ids = np.arange(40, dtype=np.int32)
    versions = (VersionSpan(3, 0, 25), VersionSpan(4, 25, 40))
    zeros = np.zeros(40, dtype=np.float32)
    return Sample(ids, zeros, np.zeros(40, np.uint8), versions, "stop", chain(texts, errors), images)


def scored_group(number: int, mean: float, samples: int = 4, side: int = 64, failed: int | None = None) -> ScoredGroup:
    """A group whose samples' totals have the mean ``mean``; sample ``failed`` has no reward."""
    hq, captions = photographed(number, "train", side)
    texts = ("[heavy blur, light noise]", captions.coarse, HOSTILE, captions.fine)
    chains = tuple(sample(hq, texts, 12.0, 10 * number + i, final=i != 1) for i in range(samples))
    prompt = Prompt(
        f"train/{number}",
        f"row-{number}",
        100 + number,
        np.zeros(3, np.int32),
        resized(hq, side // 4),
        "[light blur, light noise]",
    )
    spread = np.linspace(-0.1, 0.1, samples)
    totals = mean + spread
    valid = np.ones(samples, dtype=bool)
    scores: list[dict[str, Score]] = [
        {
            "format": Scored(1.0, {"errors": []}),
            "degradation": Scored(0.5),
            "understanding": Absent("no main object was found in the LR image"),
            "generation": Scored(0.4, {"quality": 5.0, "realism": 4.0, "consistency": 3.0}),
        }
        for _ in range(samples)
    ]
    if failed is not None:
        scores[failed]["generation"] = Failed("the visual expert did not answer")
        totals[failed], valid[failed] = np.nan, False
    group = Group(prompt, chains, 1.25, "actor-0")
    return ScoredGroup(group, tuple(scores), totals, valid, ("cat", "cup"), {"grounded_sam": 0.1, "qwen_vl": 0.4})


def evaluated(count: int, gain: float, side: int = 64) -> list[EvaluatedPrompt]:
    """Held-out prompts; every third has no object, and prompt 1 no final image."""
    prompts = []
    for i in range(count):
        hq, captions = photographed(i, "heldout", side)
        texts = ("[light blur]", captions.coarse, HOSTILE, captions.fine)
        understanding = None if i % 3 == 2 else min(1.0, 0.4 + gain)
        prompts.append(
            EvaluatedPrompt(
                row_id=f"heldout-{i}",
                total=1.5 + gain * (1 + 0.1 * (i % 5)),
                components={
                    "format": 0.9,
                    "degradation": 0.5 + gain / 2,
                    "understanding": understanding,
                    "generation": 0.3 + gain / 4,
                },
                psnr=None if i == 1 else 20.0 + i / 4 + gain,
                ssim=None if i == 1 else 0.5 + gain / 10,
                lr=resized(hq, side // 4),
                hq=hq,
                degradation="[light blur, light noise]",
                example=sample(hq, texts, 20 * (1 - gain), i, final=i != 1),
            )
        )
    return prompts
