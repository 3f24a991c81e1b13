"""Cold start of the toy policy: ``python -m toy.train_policy --minutes M --seed S --output toy/weights/policy``.

Supervised next-token training on true chains, with the loss on the answer only and over the ids that the
grammar allows, so that forced tokens carry none. The output directory must hold ``tokenizer.json``
(``python -m toy.tokenizer``); ``config.json`` and ``model.safetensors`` (fp16) are written beside it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from toy.examples import Example, batches, load_or_encode
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
BATCH_SIZE = 16
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
WARM_UP = 0.04
"""Share of the run."""


def train(family: Family, examples: list[Example], minutes: float, seed: int) -> tuple[VlcotForCausalLM, int]:
    """A policy trained for ``minutes`` of wall time, and the number of steps. Progress goes to standard output."""
    torch.manual_seed(seed)
    model = VlcotForCausalLM(CONFIG).train()
    table = SupportTable.of(family.grammar)
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=PEAK_LR, betas=BETAS)
    stream = batches(examples, BATCH_SIZE, family.vocabulary.pad, np.random.default_rng(seed))
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        ids, supports = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = model.token_logprobs(ids, table, supports)
        chosen, code = supports != int(Support.FORCED), supports == int(Support.CODE)
        loss = -logprobs.sum() / chosen.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            parts = [float(-logprobs.detach()[mask].mean()) for mask in (code, chosen & ~code)]
            print(
                f"{60 * minutes * progress:6.0f} s step {step} loss codes {parts[0]:.3f} text {parts[1]:.3f}",
                flush=True,
            )
        step += 1
    return model.eval(), step


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
    parser.add_argument("--rows", type=int, default=16_000, help="training rows, encoded before the clock starts")
    parser.add_argument("--pool", type=Path, required=True, help="file that keeps the encoded rows")
    parser.add_argument("--vq", type=Path, default=Path("toy/weights/vq"))
    parser.add_argument("--output", type=Path, default=Path("toy/weights/policy"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CONFIG.save_pretrained(args.output)
    family = Family.from_pretrained(args.output)
    examples = load_or_encode(args.pool, args.rows, args.seed, args.output, args.vq)
    print(f"{len(examples)} examples, {np.mean([len(e.ids) for e in examples]):.0f} ids each", flush=True)
    model, steps = train(family, examples, args.minutes, args.seed)
    model.half().save_pretrained(args.output)
    model.config.dtype = torch.float32  # what the weights are loaded as
    model.config.save_pretrained(args.output)
    print(f"{steps} steps, {steps * BATCH_SIZE} examples seen", flush=True)


if __name__ == "__main__":
    main()
