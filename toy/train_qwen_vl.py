"""Train the toy visual expert and write its checkpoint: ``python -m toy.train_qwen_vl``.

A model this small learns nothing from the answers alone in the time given, so linear read-outs, thrown away
afterwards, tell the hidden layers what to look for:

1. The vision tower alone: from each image token the likeness and texture of its 16x16 cell, from their mean the
   quality and realism of the image.
2. Everything, on the chat that the reward server sends and its JSON answer. From the output of the first language
   layer, the place of each image token in its picture is read: the vision tower knows only distances, and the
   language model's positions go on counting from image to image, so without it no token finds its counterpart in the
   reference. From the input of the last layer, the PSNR of each cell is read at its token and the three scores at the
   end of each image; the last layer has only to carry them to the answer.

Each score's target is spread over the two integers around its real value (`toy/judged_images.py`), so cross-entropy
is least when the expected score is right.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from reward_servers.expert_chat import MAX_SCORE, SCORE_NAMES, chat, write_answer
from toy.expert_quality import held_out_figures
from toy.judged_images import JudgedGroup, enlarge, judged_group
from toy.qwen_vl_card import write_card
from toy.qwen_vl_checkpoint import (
    IMAGE_SIZE,
    TOKENS_PER_IMAGE,
    TOY_PROMPT,
    WEIGHTS,
    build_model,
    build_processor,
    save_checkpoint,
)

MAX_GROUP = 8
SCORE_UNIT = 0.4
"""Brings the scores, 0 to 10, to about unit spread."""
_POOL = 16
"""Images made per crop; every batch draws its groups from these pools."""

Model: TypeAlias = Qwen2_5_VLForConditionalGeneration

log = logging.getLogger("train_qwen_vl")


class ChatLayout:
    """Token ids, positions and score slots of the chat about `count` restorations; all groups of that size share it."""

    def __init__(self, model: Model, processor: Qwen2_5_VLProcessor, count: int) -> None:
        blank = [np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)] * (count + 1)
        prompt = processor.apply_chat_template(chat(TOY_PROMPT, count), add_generation_prompt=True, tokenize=False)
        answer = write_answer([dict.fromkeys(SCORE_NAMES, 0)] * count) + processor.tokenizer.eos_token
        inputs = processor(text=[prompt + answer], images=blank, return_tensors="pt")
        self.ids: torch.Tensor = inputs.input_ids[0]
        self.positions = model.model.get_rope_index(
            inputs.input_ids, mm_token_type_ids=inputs.mm_token_type_ids, image_grid_thw=inputs.image_grid_thw
        )[0]
        self.image_slots = self.ids == model.config.image_token_id
        self.image_ends = torch.nonzero(self.ids == model.config.vision_end_token_id)[:, 0]
        token_id = processor.tokenizer.convert_tokens_to_ids
        self.score_ids = torch.tensor([token_id(str(score)) for score in range(MAX_SCORE + 1)])
        self.answer_start = len(self.ids) - len(processor.tokenizer(answer).input_ids)
        slots = torch.nonzero(self.ids[self.answer_start :] == self.score_ids[0])[:, 0]
        if len(slots) != count * len(SCORE_NAMES):
            raise ValueError("the tokenizer does not give each score one token")
        self.score_slots = self.answer_start + slots
        self.fixed_slots = torch.tensor(
            sorted({*range(self.answer_start, len(self.ids))} - {*self.score_slots.tolist()})
        )


def image_tokens(model: Model, processor: Qwen2_5_VLProcessor, images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] -> float32 [N, TOKENS_PER_IMAGE, hidden size] from the vision tower."""
    pixels = processor.image_processor(images=list(images), return_tensors="pt")
    tokens = model.model.visual(pixels.pixel_values, grid_thw=pixels.image_grid_thw).pooler_output
    return tokens.reshape(len(images), TOKENS_PER_IMAGE, -1)


def soft_scores(scores: torch.Tensor) -> torch.Tensor:
    """float32 [...] in 0..10 -> [..., 11]: mass on the two integers around each score, its mean is the score."""
    return (1 - (scores[..., None] - torch.arange(MAX_SCORE + 1)).abs()).clamp(min=0)


class Readouts(torch.nn.Module):
    """What hidden layers are asked for in training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = torch.nn.Linear(hidden, 3)
        self.place = torch.nn.Linear(hidden, TOKENS_PER_IMAGE)
        self.image = torch.nn.Sequential(
            # Blur takes fine texture away and noise adds it, what is good lies in between: not linear.
            torch.nn.RMSNorm(hidden),
            torch.nn.Linear(hidden, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, 2),
        )
        self.compared_cell = torch.nn.Sequential(torch.nn.RMSNorm(hidden), torch.nn.Linear(hidden, 1))
        self.compared_image = torch.nn.Sequential(torch.nn.RMSNorm(hidden), torch.nn.Linear(hidden, 3))

    def vision_loss(self, tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of image tokens [N, TOKENS_PER_IMAGE, hidden]."""
        of_cells = (self.cell(tokens) - batch.cells).square().mean()
        return of_cells + (self.image(tokens.mean(1)) - batch.scores[:, :2]).square().mean()

    def place_loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Half the cross-entropy of each token's place, of hidden states [N, TOKENS_PER_IMAGE, hidden]."""
        places = torch.arange(TOKENS_PER_IMAGE).expand(len(tokens), -1)
        return 0.5 * torch.nn.functional.cross_entropy(self.place(tokens).flatten(0, 1), places.flatten())

    def comparison_losses(self, tokens: torch.Tensor, ends: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Of hidden states at image tokens [N, TOKENS_PER_IMAGE, hidden] and at the images' ends [N, hidden]."""
        of_cells = (self.compared_cell(tokens)[..., 0] - batch.cells[..., 2]).square().mean()
        return [of_cells, (self.compared_image(ends) - batch.scores).square().mean()]


def answer_losses(
    model: Model, layout: ChatLayout, tokens: torch.Tensor, batch: Batch, readouts: Readouts
) -> list[torch.Tensor]:
    """Cross-entropy of the scores plus 0.3 times that of the answer's fixed tokens, comparison losses, place loss.

    Args:
        tokens: [groups, (count + 1) * TOKENS_PER_IMAGE, hidden size] of the reference and the restorations.
    """
    groups = len(tokens)
    flat = (batch.scores / SCORE_UNIT).reshape(groups, -1)
    ids = layout.ids.repeat(groups, 1)
    ids[:, layout.score_slots] = layout.score_ids[flat.round().long()]
    embedded = model.get_input_embeddings()(ids)
    embedded[:, layout.image_slots] = tokens
    positions = layout.positions.expand(-1, groups, -1)
    output = model.model.language_model(
        inputs_embeds=embedded, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    first, before_last = (
        output.hidden_states[i][:, layout.image_slots].unflatten(1, (-1, TOKENS_PER_IMAGE)) for i in (1, -2)
    )
    placed = readouts.place_loss(first.flatten(0, 1))
    compared = readouts.comparison_losses(
        before_last[:, 1:].flatten(0, 1),
        output.hidden_states[-2][:, layout.image_ends[1:]].flatten(0, 1),
        batch,
    )
    log_probs = torch.log_softmax(model.lm_head(output[0][:, layout.answer_start - 1 : -1]), dim=-1)
    of_scores = log_probs[:, layout.score_slots - layout.answer_start][..., layout.score_ids]
    fixed = layout.fixed_slots
    of_fixed = log_probs[:, fixed - layout.answer_start].gather(2, ids[:, fixed, None])
    return [-(soft_scores(flat) * of_scores).sum(-1).mean() - 0.3 * of_fixed.mean(), *compared, placed]


@dataclass(frozen=True)
class Batch:
    """Groups of `count` restorations; N is groups * count.

    Attributes:
        images: uint8 [groups * (count + 1), 64, 64, 3]; each group starts with its reference.
        cells: float32 [N, TOKENS_PER_IMAGE, 3], standardised (`JudgedGroup.cells`).
        scores: float32 [N, 3] in units of `1 / SCORE_UNIT`.
    """

    count: int
    images: np.ndarray
    cells: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def draw(cls, pools: list[JudgedGroup], images: int, rng: np.random.Generator) -> Batch:
        """Groups of one random size from random pools, about `images` images in all."""
        count = int(rng.integers(1, MAX_GROUP + 1))
        shown, cells, scores = [], [], []
        for _ in range(images // (count + 1)):
            pool = pools[rng.integers(len(pools))]
            chosen = rng.choice(len(pool.images), count, replace=False)
            turn, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)
            group = np.concatenate([enlarge(pool.lr)[None], pool.images[chosen]])[..., rng.permutation(3)]
            shown.append(_turned(group, turn, mirror))
            cells.append(_turned(pool.cells[chosen].reshape(count, 4, 4, 3), turn, mirror).reshape(count, -1, 3))
            scores.append(pool.scores[chosen])
        marks = (np.concatenate(cells) - (0.5, 0.5, 25)) / (0.35, 0.3, 8)
        flat = np.concatenate(scores) * SCORE_UNIT
        return cls(count, np.concatenate(shown), *(torch.as_tensor(x, dtype=torch.float32) for x in (marks, flat)))


def _turned(images: np.ndarray, turn: int, mirror: bool) -> np.ndarray:
    """[N, H, W, C] turned by `turn` quarters, then mirrored."""
    images = np.rot90(images, turn, axes=(1, 2))
    return np.ascontiguousarray(images[:, :, ::-1] if mirror else images)


def optimise(
    name: str,
    parameters: list[torch.nn.Parameter],
    losses_of: Callable[[], list[torch.Tensor]],
    steps: int,
    rate: float,
) -> None:
    """AdamW on the sum of the losses, with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 1), pct_start=0.1)
    seen = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        losses = losses_of()
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen.append([loss.item() for loss in losses])
        if step % 100 == 0:
            means = " ".join(f"{mean:.3f}" for mean in np.mean(seen[-100:], axis=0))
            log.info("%s %d losses %s, %.2f s/step", name, step, means, (time.monotonic() - started) / step)


def restorations(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Those of [groups * (count + 1), ...] that are no reference: [groups * count, ...]."""
    return tokens.unflatten(0, (-1, count + 1))[:, 1:].flatten(0, 1)


def train_vision(
    model: Model, processor: Qwen2_5_VLProcessor, draw: Callable[[int], Batch], readouts: Readouts, steps: int
) -> None:
    """Phase 1; about 64 images a step."""

    def losses_of() -> list[torch.Tensor]:
        batch = draw(64)
        return [readouts.vision_loss(restorations(image_tokens(model, processor, batch.images), batch.count), batch)]

    learned = [*model.model.visual.parameters(), *readouts.parameters()]
    optimise("vision", learned, losses_of, steps, 3e-3)


def train_together(
    model: Model, processor: Qwen2_5_VLProcessor, draw: Callable[[int], Batch], readouts: Readouts, steps: int
) -> None:
    """Phase 2; about 80 images a step."""
    layouts = {count: ChatLayout(model, processor, count) for count in range(1, MAX_GROUP + 1)}

    def losses_of() -> list[torch.Tensor]:
        batch = draw(80)
        tokens = image_tokens(model, processor, batch.images)
        in_chats = tokens.unflatten(0, (-1, batch.count + 1)).flatten(1, 2)
        seen = readouts.vision_loss(restorations(tokens, batch.count), batch)
        return [*answer_losses(model, layouts[batch.count], in_chats, batch, readouts), seen]

    optimise("together", [*model.parameters(), *readouts.parameters()], losses_of, steps, 2e-3)


def make_pools(count: int, seed: int) -> list[JudgedGroup]:
    """Pools of 16 restorations of `count` training crops, made by two processes."""
    with ProcessPoolExecutor(2) as executor:
        make = partial(judged_group, split="train", size=_POOL, seed=seed)
        return list(executor.map(make, range(count), chunksize=20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, nargs=2, default=(2000, 4000), help="of the two phases")
    parser.add_argument("--pools", type=int, default=1600, help="crops, each with 16 restorations")
    parser.add_argument("--start", type=Path, help="checkpoint to start from; random weights by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)

    started = time.monotonic()
    pools = make_pools(args.pools, args.seed)
    log.info("%d pools made in %.0f s", len(pools), time.monotonic() - started)
    processor = build_processor()
    if args.start is None:
        model = build_model(processor, args.seed)
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    readouts = Readouts(model.config.text_config.hidden_size)
    draw = partial(Batch.draw, pools, rng=np.random.default_rng(args.seed))
    train_vision(model, processor, draw, readouts, args.steps[0])
    train_together(model, processor, draw, readouts, args.steps[1])
    model.eval()
    save_checkpoint(model, processor, args.output)
    figures = held_out_figures(model, processor, groups=48)
    log.info("held out: %s", figures)
    write_card(args.output, vars(args), figures, minutes=(time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
