"""Cold start of the toy policy: ``python -m toy.train_policy --minutes M --seed S --output toy/weights/policy``.

Supervised next-token training on true chains and openings (`toy/examples.py`), with the loss on the answer only and
over the ids that the grammar allows, so that forced tokens carry none. The output directory must hold
``tokenizer.json`` (``python -m toy.tokenizer``); ``config.json`` and ``model.safetensors`` (fp16) join it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from toy.examples import Example, Pool, batches
from toy.rows import LAYOUT
from toy.tokenizer import VOCABULARY_SIZE
from vlcot.grammar import Support
from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM

HEAD_DIM = 32
"""A head size that vLLM's CPU attention supports."""
CONFIG = VlcotConfig.from_dict(
    {
        "architectures": ["VlcotForCausalLM"],
        "layout": asdict(LAYOUT),
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
)
CHAINS, OPENINGS = 16, 32
"""Per step."""
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
WARM_UP = 0.04
"""Share of the run."""


def train(
    model: VlcotForCausalLM,
    family: Family,
    chains: list[Example],
    openings: list[Example],
    minutes: float,
    seed: int,
) -> int:
    """Train ``model`` for ``minutes`` of wall time; returns the number of steps. Progress goes to standard output."""
    model.train()
    table = SupportTable.of(family.grammar)
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=PEAK_LR, betas=BETAS)
    rng, pad = np.random.default_rng(seed), family.vocabulary.pad
    streams = batches(chains, CHAINS, pad, rng), batches(openings, OPENINGS, pad, rng)
    recent: list[list[float]] = []
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.zero_grad()
        losses = [_loss(model, table, *next(stream)) for stream in streams]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append([loss.item() for loss in losses])
        if step % 50 == 0:
            means = np.mean(recent[-50:], axis=0)
            print(
                f"{60 * minutes * progress:6.0f} s step {step} chains {means[0]:.3f} openings {means[1]:.3f}",
                flush=True,
            )
        step += 1
    return step


def _loss(model: VlcotForCausalLM, table: SupportTable, ids: torch.Tensor, supports: torch.Tensor) -> torch.Tensor:
    """Mean negative log-probability, nats, of the ids that were chosen."""
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = model.token_logprobs(ids, table, supports)
    return -logprobs.sum() / (supports != int(Support.FORCED)).sum()


def _parameter_groups(model: VlcotForCausalLM) -> list[dict[str, object]]:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > HEAD_DIM]
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="policy of an earlier cycle instead of random weights")
    parser.add_argument("--chains", type=int, default=16_000, help="training rows, encoded before the clock starts")
    parser.add_argument(
        "--openings", type=int, default=32_000, help="further rows of which only the opening is learned"
    )
    parser.add_argument(
        "--pool", type=Path, default=Path("build/toy_policy_examples.npz"), help="keeps the encoded rows"
    )
    parser.add_argument("--vq", type=Path, default=Path("toy/weights/vq"))
    parser.add_argument("--output", type=Path, default=Path("toy/weights/policy"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CONFIG.save_pretrained(args.output)
    family = Family.from_pretrained(args.output)
    pool = Pool(args.chains, args.openings, args.seed, args.output, args.vq)
    chains, openings = pool.load_or_encode(args.pool)
    print(f"{len(chains)} chains, {len(openings)} openings", flush=True)
    torch.manual_seed(args.seed)
    if args.start is None:
        model = VlcotForCausalLM(CONFIG)
    else:
        model = VlcotForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    steps = train(model, family, chains, openings, args.minutes, args.seed)
    model.half().save_pretrained(args.output)
    model.config.dtype = torch.float32  # what the weights are loaded as
    model.config.save_pretrained(args.output)
    print(f"{steps} steps, {steps * CHAINS} chains and {steps * OPENINGS} openings seen", flush=True)


if __name__ == "__main__":
    main()
