"""Train the toy visual expert and write its checkpoint: ``python -m toy.train_qwen_vl``.

Three phases, each of which starts where the last one ended (a model this small learns nothing from the answers alone
in the time given):

1. The vision tower, with a linear read-out on top that is then thrown away: quality and realism of the image, mean
   colour and texture of each token's 16x16 cell.
2. The language model on the frozen image tokens: the chat that the reward server sends and its JSON answer.
3. Both together.

In 2 and 3 each score's target is spread over the two integers around its real value (`toy/judged_images.py`), so
cross-entropy is least when the expected score is right.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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


def soft_scores(scores: np.ndarray) -> torch.Tensor:
    """float [...] in 0..10 -> float32 [..., 11]: mass on the two integers around each score, its mean is the score."""
    value = torch.as_tensor(scores, dtype=torch.float32)
    return (1 - (value[..., None] - torch.arange(MAX_SCORE + 1)).abs()).clamp(min=0)


def answer_loss(model: Model, layout: ChatLayout, tokens: torch.Tensor, scores: np.ndarray) -> torch.Tensor:
    """Cross-entropy of the scores plus 0.1 times that of the answer's fixed tokens.

    Args:
        tokens: [groups, (count + 1) * TOKENS_PER_IMAGE, hidden size] of the reference and the restorations.
        scores: [groups, count, 3].
    """
    flat = scores.reshape(len(scores), -1)
    ids = layout.ids.repeat(len(scores), 1)
    ids[:, layout.score_slots] = layout.score_ids[flat.round().astype(np.int64)]
    embedded = model.get_input_embeddings()(ids)
    embedded[:, layout.image_slots] = tokens
    positions = layout.positions.expand(-1, len(scores), -1)
    hidden = model.model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)[0]
    log_probs = torch.log_softmax(model.lm_head(hidden[:, layout.answer_start - 1 : -1]), dim=-1)
    of_scores = log_probs[:, layout.score_slots - layout.answer_start][..., layout.score_ids]
    fixed = layout.fixed_slots
    of_fixed = log_probs[:, fixed - layout.answer_start].gather(2, ids[:, fixed, None])
    return -(soft_scores(flat) * of_scores).sum(-1).mean() - 0.1 * of_fixed.mean()


def turned(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N, 64, 64, 3], all turned, mirrored and with their colour channels exchanged in the same way."""
    images = np.rot90(images, int(rng.integers(4)), axes=(1, 2))[..., rng.permutation(3)]
    return np.ascontiguousarray(images[:, :, ::-1] if rng.random() < 0.5 else images)


def shown(pool: JudgedGroup, chosen: np.ndarray) -> np.ndarray:
    """Reference and the chosen restorations, uint8 [1 + len(chosen), 64, 64, 3]."""
    return np.concatenate([enlarge(pool.lr)[None], pool.images[chosen]])


def optimise(
    name: str, parameters: list[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor], steps: int, rate: float
) -> None:
    """AdamW with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    wall, cpu = time.monotonic(), time.process_time()
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            spent = (time.monotonic() - wall) / step, (time.process_time() - cpu) / step
            log.info("%s %d loss %.4f, %.2f s/step (%.2f s CPU)", name, step, np.mean(losses[-100:]), *spent)


def train_vision(
    model: Model, processor: Qwen2_5_VLProcessor, pools: list[JudgedGroup], steps: int, rng: np.random.Generator
) -> None:
    """Phase 1; 48 images a step."""
    hidden = model.config.text_config.hidden_size
    read_cell, read_mean = torch.nn.Linear(hidden, 4), torch.nn.Linear(hidden, 2)
    # Blur takes fine texture away and noise adds it, what is good lies in between: so one read-out is not linear. The
    # linear one draws as much as possible into the tower.
    read_image = torch.nn.Sequential(
        torch.nn.RMSNorm(hidden), torch.nn.Linear(hidden, 256), torch.nn.GELU(), torch.nn.Linear(256, 2)
    )

    def loss_of() -> torch.Tensor:
        images, marks = [], []
        for _ in range(12):
            pool = pools[rng.integers(len(pools))]
            chosen = rng.choice(len(pool.images), 4, replace=False)
            images.append(turned(pool.images[chosen], rng))
            marks.append(pool.scores[chosen, :2])
        batch = np.concatenate(images)
        cells = batch.reshape(-1, 4, 16, 4, 16, 3).swapaxes(2, 3).reshape(len(batch), TOKENS_PER_IMAGE, -1, 3) / 255
        texture = np.log(cells.std(axis=2).mean(axis=-1, keepdims=True) + 0.01)
        local = torch.as_tensor(np.concatenate([4 * cells.mean(axis=2), texture], axis=-1), dtype=torch.float32)
        image_scores = torch.as_tensor(np.concatenate(marks) / 2.5, dtype=torch.float32)
        tokens = image_tokens(model, processor, batch)
        means = tokens.mean(1)
        image_loss = sum((read(means) - image_scores).square().mean() for read in (read_image, read_mean))
        return image_loss + 0.1 * (read_cell(tokens) - local).square().mean()

    learned = [model.model.visual, read_cell, read_mean, read_image]
    optimise("vision", [p for module in learned for p in module.parameters()], loss_of, steps, 3e-3)


def train_language(
    model: Model,
    layouts: dict[int, ChatLayout],
    processor: Qwen2_5_VLProcessor,
    pools: list[JudgedGroup],
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Phase 2; about 100 images a step. Image tokens are computed once, for two ways of turning each pool."""
    everything = np.arange(_POOL)
    with torch.no_grad():
        tokens = [
            torch.stack([image_tokens(model, processor, turned(shown(pool, everything), rng)) for _ in range(2)])
            for pool in pools
        ]

    def loss_of() -> torch.Tensor:
        count = int(rng.integers(1, MAX_GROUP + 1))
        groups, scores = [], []
        for _ in range(100 // (count + 1)):
            number = rng.integers(len(pools))
            chosen = rng.choice(_POOL, count, replace=False)
            # Index 0 of a pool's tokens is its reference.
            groups.append(tokens[number][rng.integers(2), np.append(0, chosen + 1)].flatten(0, 1))
            scores.append(pools[number].scores[chosen])
        return answer_loss(model, layouts[count], torch.stack(groups), np.stack(scores))

    optimise("language", list(model.model.language_model.parameters()), loss_of, steps, 3e-3)


def train_together(
    model: Model,
    layouts: dict[int, ChatLayout],
    processor: Qwen2_5_VLProcessor,
    pools: list[JudgedGroup],
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Phase 3; about 64 images a step."""

    def loss_of() -> torch.Tensor:
        count = int(rng.integers(1, MAX_GROUP + 1))
        images, scores = [], []
        for _ in range(64 // (count + 1)):
            pool = pools[rng.integers(len(pools))]
            chosen = rng.choice(_POOL, count, replace=False)
            images.append(turned(shown(pool, chosen), rng))
            scores.append(pool.scores[chosen])
        tokens = image_tokens(model, processor, np.concatenate(images))
        return answer_loss(
            model, layouts[count], tokens.unflatten(0, (len(scores), -1)).flatten(1, 2), np.stack(scores)
        )

    optimise("together", list(model.parameters()), loss_of, steps, 1e-3)


def make_pools(count: int, seed: int) -> list[JudgedGroup]:
    """Pools of 16 restorations of `count` training crops, made by two processes."""
    with ProcessPoolExecutor(2) as executor:
        make = partial(judged_group, split="train", size=_POOL, seed=seed)
        return list(executor.map(make, range(count), chunksize=20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, nargs=3, default=(2500, 1500, 300), help="of the three phases")
    parser.add_argument("--pools", type=int, default=800, help="crops, each with 16 restorations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    started = time.monotonic()
    pools = make_pools(args.pools, args.seed)
    log.info("%d pools made in %.0f s", len(pools), time.monotonic() - started)
    processor = build_processor()
    model = build_model(processor, args.seed)
    rng = np.random.default_rng(args.seed)
    layouts = {count: ChatLayout(model, processor, count) for count in range(1, MAX_GROUP + 1)}
    train_vision(model, processor, pools, args.steps[0], rng)
    train_language(model, layouts, processor, pools, args.steps[1], rng)
    train_together(model, layouts, processor, pools, args.steps[2], rng)
    model.eval()
    save_checkpoint(model, processor, args.output)
    figures = held_out_figures(model, processor, groups=48)
    log.info("held out: %s", figures)
    write_card(args.output, vars(args), figures, minutes=(time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
