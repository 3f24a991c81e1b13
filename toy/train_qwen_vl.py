"""Train the toy visual expert and write its checkpoint: ``python -m toy.train_qwen_vl``.

Supervised: the chat that the reward server sends, with the JSON answer. Each score's target is spread over the two
integers around its real value (`toy/judged_images.py`), so cross-entropy is least when the expected score is right.
"""

from __future__ import annotations

import argparse
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from reward_servers.expert_chat import MAX_SCORE, SCORE_NAMES, chat, write_answer
from toy.expert_quality import held_out_figures
from toy.judged_images import JudgedGroup, enlarge, judged_group
from toy.qwen_vl_card import write_card
from toy.qwen_vl_checkpoint import TOY_PROMPT, WEIGHTS, build_model, build_processor, save_checkpoint

MAX_GROUP = 8
_POOL = 16
"""Images made per crop; every batch draws its groups from these pools."""

log = logging.getLogger("train_qwen_vl")


class ChatBatch:
    """Token ids, positions and score slots of the chat about `count` restorations; all groups of that size share it."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, count: int) -> None:
        blank = [np.zeros((64, 64, 3), dtype=np.uint8)] * (count + 1)
        prompt = processor.apply_chat_template(chat(TOY_PROMPT, count), add_generation_prompt=True, tokenize=False)
        answer = write_answer([dict.fromkeys(SCORE_NAMES, 0)] * count) + processor.tokenizer.eos_token
        inputs = processor(text=[prompt + answer], images=blank, return_tensors="pt")
        self.ids: torch.Tensor = inputs.input_ids
        self.positions = model.model.get_rope_index(
            inputs.input_ids, mm_token_type_ids=inputs.mm_token_type_ids, image_grid_thw=inputs.image_grid_thw
        )[0]
        self.answer_length = len(processor.tokenizer(answer).input_ids)
        vocabulary = processor.tokenizer.convert_tokens_to_ids
        self.score_ids = torch.tensor([vocabulary(str(score)) for score in range(MAX_SCORE + 1)])
        self.score_slots = torch.nonzero(self.ids[0, -self.answer_length :] == self.score_ids[0])[:, 0]
        if len(self.score_slots) != count * len(SCORE_NAMES):
            raise ValueError("the tokenizer does not give each score one token")


def soft_scores(scores: np.ndarray) -> torch.Tensor:
    """float [...] in 0..10 -> float32 [..., 11]: mass on the two integers around each score, its mean is the score."""
    value = torch.as_tensor(scores, dtype=torch.float32)
    return (1 - (value[..., None] - torch.arange(MAX_SCORE + 1)).abs()).clamp(min=0)


def batch_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    batch: ChatBatch,
    images: list[np.ndarray],
    scores: np.ndarray,
) -> torch.Tensor:
    """Cross-entropy of the scores plus 0.1 times that of the answer's fixed tokens.

    Args:
        images: per group the LR image and its restorations, uint8 [64, 64, 3], one after another.
        scores: [groups, count, 3].
    """
    groups = scores.shape[0]
    vision = processor.image_processor(images=images, return_tensors="pt")
    ids = batch.ids.repeat(groups, 1)
    slots = ids.shape[1] - batch.answer_length + batch.score_slots
    targets = soft_scores(scores.reshape(groups, -1))
    ids[:, slots] = batch.score_ids[scores.reshape(groups, -1).round().astype(np.int64)]
    logits = model(
        input_ids=ids,
        position_ids=batch.positions.repeat(1, groups, 1),
        pixel_values=vision.pixel_values,
        image_grid_thw=vision.image_grid_thw,
        use_cache=False,
        logits_to_keep=batch.answer_length + 1,
    ).logits[:, :-1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    fixed = torch.ones(batch.answer_length, dtype=torch.bool)
    fixed[batch.score_slots] = False
    score_loss = -(targets * log_probs[:, batch.score_slots][..., batch.score_ids]).sum(-1).mean()
    answer = ids[:, -batch.answer_length :]
    fixed_loss = -log_probs.gather(2, answer[..., None])[:, fixed].mean()
    return score_loss + 0.1 * fixed_loss


def draw_batch(
    pools: list[JudgedGroup], count: int, groups: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Groups from random pools, each turned, mirrored and with permuted colour channels as a whole."""
    images: list[np.ndarray] = []
    scores = []
    for _ in range(groups):
        pool = pools[rng.integers(len(pools))]
        chosen = rng.choice(len(pool.images), count, replace=False)
        stack = np.concatenate([enlarge(pool.lr)[None], pool.images[chosen]])
        stack = np.rot90(stack, rng.integers(4), axes=(1, 2))[..., rng.permutation(3)]
        if rng.random() < 0.5:
            stack = stack[:, :, ::-1]
        images += list(np.ascontiguousarray(stack))
        scores.append(pool.scores[chosen])
    return images, np.stack(scores)


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pools: list[JudgedGroup],
    steps: int,
    learning_rate: float,
    images_per_step: int,
    seed: int,
) -> None:
    """AdamW with warm-up and cosine decay; group size 1 to 3 in the first fifth, then 1 to `MAX_GROUP`."""
    batches = {count: ChatBatch(model, processor, count) for count in range(1, MAX_GROUP + 1)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(seed)
    started, losses = time.monotonic(), []
    model.train()
    for step in range(1, steps + 1):
        count = int(rng.integers(1, (3 if step < steps / 5 else MAX_GROUP) + 1))
        images, scores = draw_batch(pools, count, max(2, images_per_step // (count + 1)), rng)
        loss = batch_loss(model, processor, batches[count], images, scores)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            log.info("step %d loss %.4f, %.2f s/step", step, np.mean(losses[-50:]), (time.monotonic() - started) / step)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--images-per-step", type=int, default=40)
    parser.add_argument("--pools", type=int, default=1200, help="crops, each with 16 restorations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    started = time.monotonic()
    make_pool = partial(judged_group, split="train", size=_POOL, seed=args.seed)
    with ProcessPoolExecutor(2) as executor:
        pools = list(executor.map(make_pool, range(args.pools), chunksize=20))
    log.info("%d pools made in %.0f s", len(pools), time.monotonic() - started)

    processor = build_processor()
    model = build_model(processor, args.seed)
    train(model, processor, pools, args.steps, args.learning_rate, args.images_per_step, args.seed)
    save_checkpoint(model, processor, args.output)
    figures = held_out_figures(model, processor, groups=48)
    log.info("held out: %s", figures)
    write_card(args.output, vars(args), figures, wall_s=time.monotonic() - started)


if __name__ == "__main__":
    main()
