"""Scores of a toy policy on held-out rows: ``python -m toy.evaluate_policy --rows 128 --sheet /tmp/policy.png``.

One chain per row, sampled at temperature 1. A text is judged on its own, whether or not its chain is well-formed
(a missing text is wrong); images are judged where the chain has them, and their share is reported.

The degradation is judged on many more rows, of which only the first text is sampled: after two stages of noise,
resizing and JPEG a 16x16 image says little about six of the eight components, so the gain over chance is small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from toy.rows import INSTRUCTION, LAYOUT, ToyRow, row
from vlcot.degradation import COMPONENT_COUNT, components
from vlcot.grammar import CHOICES, ChainState
from vlcot.groups import Scored
from vlcot.images import upscale_for_policy
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.rewards import understanding_reward
from vlcot.sequence import ParsedChain
from vlcot.tokenizer.image import ImageTokenizer

MAX_TOKENS = 256
DEGRADATION_TOKENS = 32
DEGRADATION_BATCH = 256
STEP_NAMES = ("coarse", "middle", "final")


@dataclass(frozen=True, eq=False)
class Toy:
    """A policy and its VQ, loaded."""

    family: Family
    model: VlcotForCausalLM
    images: ImageTokenizer

    @classmethod
    def load(cls, policy: Path, vq: Path) -> Toy:
        """Load both in fp32.

        Raises:
            FileNotFoundError: a checkpoint is missing.
        """
        family = Family.from_pretrained(policy)
        model = VlcotForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        return cls(family, model, ImageTokenizer.from_pretrained(vq))

    def prompts(self, rows: Sequence[ToyRow]) -> np.ndarray:
        """int64 [B, P]; all prompts of the toy have the same length."""
        codes = self.images.encode(np.stack([upscale_for_policy(r.lr, LAYOUT.full_size) for r in rows])).numpy()
        return np.stack([self.family.builder.prompt(INSTRUCTION, c) for c in codes]).astype(np.int64)

    def degradations(self, rows: Sequence[ToyRow], seed: int, temperature: float = 1.0) -> list[ParsedChain]:
        """Chains that end behind the degradation text, one per row."""
        parts = [rows[i : i + DEGRADATION_BATCH] for i in range(0, len(rows), DEGRADATION_BATCH)]
        chains = [self.sample(p, seed + i, temperature, DEGRADATION_TOKENS) for i, p in enumerate(parts)]
        return [chain for part in chains for chain in part]

    @torch.no_grad()
    def sample(
        self, rows: Sequence[ToyRow], seed: int, temperature: float = 1.0, max_tokens: int = MAX_TOKENS
    ) -> list[ParsedChain]:
        """One chain per row, sampled under the grammar."""
        generator = torch.Generator().manual_seed(seed)
        grammar = self.family.grammar
        allowed = {kind: torch.from_numpy(grammar.support_ids(kind)) for kind in CHOICES}
        states = [ChainState(grammar) for _ in rows]
        chains: list[list[int]] = [[] for _ in rows]
        ids, cache = torch.from_numpy(self.prompts(rows)), None
        for _ in range(max_tokens):
            out = self.model.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = self.model.lm_head(out.last_hidden_state[:, -1]) / temperature
            supports = [state.next() for state in states]
            tokens = [forced for _, forced in supports]
            for kind, choices in allowed.items():
                members = [i for i, (support, _) in enumerate(supports) if support is kind]
                if members:
                    picks = logits[members][:, choices].softmax(-1).multinomial(1, generator=generator)
                    for i, token in zip(members, choices[picks[:, 0]].tolist(), strict=True):
                        tokens[i] = token
            for state, chain, token in zip(states, chains, tokens, strict=True):
                if not state.finished:
                    chain.append(token)
                state.advance(token)
            if all(state.finished for state in states):
                break
            ids = torch.tensor(tokens)[:, None]
        return [self.family.builder.parse(chain) for chain in chains]


@dataclass(frozen=True)
class DegradationAccuracy:
    """How well degradation texts fit the images they were written for.

    Attributes:
        accuracy: mean reward n_correct / n_total.
        shuffled: the same texts against the truths of other rows, mean of many shuffles: chance.
        p_value: share of shuffles that reach ``accuracy``, one-sided.
        per_component: accuracy minus that of the shuffles for each of the 8 components.
    """

    accuracy: float
    shuffled: float
    p_value: float
    per_component: tuple[float, ...]


def degradation_accuracy(
    chains: Sequence[ParsedChain], rows: Sequence[ToyRow], permutations: int = 2000
) -> DegradationAccuracy:
    """Permutation test of the degradation texts; a missing or malformed text has every component wrong."""
    said = np.array([_eight(components(chain.degradation or "")) for chain in chains])
    true = np.array([_eight(components(r.degradation)) for r in rows])
    rng = np.random.default_rng(0)
    hits = (said == true).mean(axis=0)
    shuffles = np.array([(said == true[rng.permutation(len(true))]).mean(axis=0) for _ in range(permutations)])
    p_value = (1 + (shuffles.mean(axis=1) >= hits.mean()).sum()) / (1 + permutations)
    gains = tuple(float(g) for g in hits - shuffles.mean(axis=0))
    return DegradationAccuracy(float(hits.mean()), float(shuffles.mean()), float(p_value), gains)


def _eight(phrases: tuple[str, ...] | None) -> list[str]:
    return list(phrases) if phrases is not None and len(phrases) == COMPONENT_COUNT else [""] * COMPONENT_COUNT


def quality(images: Sequence[np.ndarray | None], targets: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean PSNR in dB and SSIM (RGB) over the images that exist, and their share."""
    pairs = [(a, b) for a, b in zip(images, targets, strict=True) if a is not None]
    psnr = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in pairs]
    ssim = [structural_similarity(b, a, channel_axis=2, data_range=255) for a, b in pairs]
    return {"psnr": _mean(psnr), "ssim": _mean(ssim), "share": len(pairs) / len(images)}


def evaluate(toy: Toy, rows: Sequence[ToyRow], chains: Sequence[ParsedChain]) -> dict[str, object]:
    """All figures of one set of chains."""
    named = [understanding_reward(c.coarse, r.objects) for c, r in zip(chains, rows, strict=True)]
    report: dict[str, object] = {
        "rows": len(rows),
        "format_rate": float(np.mean([chain.well_formed for chain in chains])),
        "understanding": _mean([score.value for score in named if isinstance(score, Scored)]),
        "caption_exact": float(np.mean([c.coarse == r.coarse for c, r in zip(chains, rows, strict=True)])),
    }
    targets = list(zip(*(r.targets() for r in rows), strict=True))
    for step, name in enumerate(STEP_NAMES):
        report[name] = quality(decode(toy.images, chains, step), targets[step])
        codes = toy.images.encode(np.stack(targets[step]))
        report[f"{name}_vq_ceiling"] = quality(list(toy.images.decode(codes).numpy()), targets[step])
    report["bicubic"] = quality([upscale_for_policy(r.lr, LAYOUT.full_size) for r in rows], targets[-1])
    return report


def decode(images: ImageTokenizer, chains: Sequence[ParsedChain], step: int) -> list[np.ndarray | None]:
    """uint8 images of one step, None where a chain has none."""
    return [
        images.decode(codes[None])[0].numpy() if (codes := chain.images[step]) is not None else None for chain in chains
    ]


def contact_sheet(toy: Toy, rows: Sequence[ToyRow], chains: Sequence[ParsedChain], scale: int = 2) -> Image.Image:
    """One line per row: LR, coarse, middle, final, HQ, each enlarged to 64 * ``scale`` pixels."""
    side = LAYOUT.full_size * scale
    sheet = Image.new("RGB", (5 * side, len(rows) * side), "red")
    steps = [decode(toy.images, chains, step) for step in range(3)]
    for y, r in enumerate(rows):
        for x, pixels in enumerate((r.lr, *(images[y] for images in steps), r.hq)):
            if pixels is not None:
                tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(tile, (x * side, y * side))
    return sheet


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", type=Path, default=Path("toy/weights/policy"))
    parser.add_argument("--vq", type=Path, default=Path("toy/weights/vq"))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--degradation-rows", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="contact sheet of the first 16 rows (png)")
    args = parser.parse_args()
    toy = Toy.load(args.policy, args.vq)
    rows = [row(i, "heldout") for i in range(args.rows)]
    chains = toy.sample(rows, args.seed, args.temperature)
    if args.sheet:
        contact_sheet(toy, rows[:16], chains[:16]).save(args.sheet)
    for r, chain in zip(rows[:4], chains[:4], strict=True):
        print(r.texts, chain.texts, chain.errors, sep="\n  ")
    print(json.dumps(evaluate(toy, rows, chains), indent=2), flush=True)
    many = [row(i, "heldout") for i in range(args.degradation_rows)]
    for temperature in (1.0, 0.1):
        accuracy = degradation_accuracy(toy.degradations(many, args.seed, temperature), many)
        print(f"degradation, {len(many)} rows, temperature {temperature}:", json.dumps(asdict(accuracy)), flush=True)


if __name__ == "__main__":
    main()
