"""TRL's `GRPOTrainer` on prompts of ids; :mod:`benchmarks.trl_loop` runs it in a process that has TRL on its path.

Prints one JSON object: seconds of each step, TRL's version, completion tokens of the shortest and longest sample.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM


class Clock(TrainerCallback):
    """End of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(logs)


def id_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Text "17 402" is the ids 17 and 402, so that both systems get the same prompts."""
    vocabulary = family.vocabulary
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary.size)}, unk_token=str(vocabulary.pad)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": str(vocabulary.pad), "eos_token": str(vocabulary.turn_end)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    VlcotConfig.auto_map = {}  # TRL reads it of every architecture that is not in transformers
    family = Family.from_pretrained(job["policy"])
    model = VlcotForCausalLM.from_pretrained(job["policy"], dtype=torch.float32, attn_implementation="sdpa")
    size, groups, at_once = job["group_size"], job["groups_per_step"], job["samples_at_once"]
    config = trl.GRPOConfig(
        output_dir=job["output_dir"],
        use_cpu=True,
        bf16=False,
        max_steps=job["steps"],
        num_generations=size,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=groups * size // at_once,
        max_completion_length=job["new_tokens"],
        temperature=1.0,
        top_k=0,
        beta=job["kl_beta"],
        loss_type="grpo",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in job["prompts"]]}),
        processing_class=id_tokenizer(family),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [log for log in clock.logs if "completions/min_length" in log]
    print(
        json.dumps(
            {
                "version": trl.__version__,
                "step_s": [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)],
                "shortest": min(log["completions/min_length"] for log in lengths),
                "longest": max(log["completions/max_length"] for log in lengths),
                "kl": lengths[-1].get("kl"),
            }
        )
    )


if __name__ == "__main__":
    main()
