"""``rl-system restore``: photographs through a trained policy."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl_system.commands import exit_codes
from rl_system.commands.arguments import natural, positive

if TYPE_CHECKING:
    from actors.decoding import EntropyTopK
    from rl_system.studies.restore.files import Job
    from rl_system.studies.restore.pictures import Drawing
    from rl_system.studies.restore.policy import Checkpoint, QuestionWriter
    from rl_system.studies.restore.progress import Progress
    from rl_system.studies.restore.run import Outcome, Wanted
    from rl_system.studies.restore.sampling import Sampler

PROGRAM = "rl-system restore"
ALIGN = ("wavelet", "adain", "none")
BACKENDS = ("vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
MOST_UPSCALE = 16.0
SMALL_HIDDEN_SIZE = 1024
CPU_CACHE_SHARE = 0.5
"""Of the free memory, that the key/value cache may take on a CPU at most."""


def run(args: list[str]) -> int:
    """Restore; returns the exit code: 0 all done, 1 a picture failed, 2 refused, 130 interrupted."""
    options = _parser().parse_args(args)
    try:
        plan = _plan(options)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    try:
        return _restore(options, plan)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; finished pictures are kept, --skip-existing goes on", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:  # not of one picture: those are in the log
        print(f"{PROGRAM}: {type(error).__name__}: {error}", file=sys.stderr)
        if os.environ.get("RL_SYSTEM_TRACEBACK"):
            raise
        return exit_codes.ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Restores photographs with a trained policy, to PNG files of exactly UPSCALE times the input.",
        epilog="The toy, to try it: --checkpoint toy/weights/policy. See docs/restore.md.",
    )
    add = parser.add_argument
    add("--input", metavar="FILE|DIR|GLOB", nargs="+", required=True, help="photographs; '**' in a pattern: any depth")
    add("--output", metavar="DIR|FILE.png", required=True, type=Path, help="folder of the results, or of one the file")
    add("--checkpoint", metavar="DIR", required=True, type=Path, help="directory of a run (runs/NAME) or of a policy")
    add("--image-tokenizer", metavar="DIR", type=Path, help="default: that of the checkpoint's run")
    add("--instruction", metavar="TEXT", help="the question, with <|image|>; default: that of the checkpoint's run")
    add("--upscale", metavar="X", type=_upscale, default=4.0, help="result over input along a side, from 1; default 4")
    add(
        "--tile",
        metavar="N",
        type=positive,
        help="side of a tile in the result's pixels; default: what the policy draws",
    )
    add(
        "--tile-overlap",
        metavar="N",
        type=natural,
        help="pixels that tiles share at least; default: a quarter of a tile",
    )
    add("--align", choices=ALIGN, default="wavelet", help="take colours from the bicubic input; default wavelet")
    add("--seed", metavar="N", type=natural, default=0)
    add("--samples", metavar="N", type=positive, default=1, help="results of each picture; all are kept unless --best")
    add("--best", metavar="EXPERT", help="keep the best sample only: agreement, likelihood, qwen_vl, MUSIQ, ... (docs)")
    add("--weights", metavar="DIR", type=Path, help="weight files of the metric that chooses (docs/evaluate.md)")
    add("--reward-url", metavar="URL", help="reward servers, where qwen_vl chooses (docs/reward-servers.md)")
    add("--temperature", metavar="T", type=_temperature, help="of sampling; default: that of training")
    add("--guidance", metavar="S", type=_guidance, default=1.0, help="inside images; 1, the default, is off (docs)")
    add(
        "--image-top-k", metavar="K|dynamic", type=_image_top_k, help="of image codes, by entropy or fixed; default all"
    )
    add("--text-top-k", metavar="K", type=positive, help="of text; 1 is greedy; default all")
    add("--save-steps", action="store_true", help="coarse and middle images and the chain's texts, in OUTPUT/steps")
    add("--compare", action="store_true", help="strips of bicubic and restored, in OUTPUT/compare")
    add("--backend", choices=BACKENDS, help="default vllm; transformers with --guidance, or where vLLM does not run")
    add("--device", choices=DEVICES, default="auto", help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="auto", help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--batch", metavar="N", type=positive, default=32, help="chains sampled at a time; default 32")
    add("--skip-existing", action="store_true", help="leave out pictures whose results are there")
    add("--json", action="store_true", help="one JSON object per picture on standard output, then a summary")
    return parser


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything that was checked before any engine starts."""

    jobs: list[Job]
    others: list[str]
    checkpoint: Checkpoint
    wanted: Wanted
    writer: QuestionWriter
    start: Callable[[int], Sampler]
    progress: Progress


def _plan(options: argparse.Namespace) -> _Plan:
    from transformers.utils.logging import disable_progress_bar

    from rl_system.studies.restore import experts, files, policy
    from rl_system.studies.restore.progress import Progress
    from rl_system.studies.restore.run import Wanted, tiles_of

    if options.best is not None and options.samples == 1:
        raise ValueError("--best chooses among --samples N, and N is 1")
    if options.best is not None and options.best not in experts.EXPERTS:
        raise ValueError(f"--best {options.best}: there are {', '.join(experts.EXPERTS)}")
    kept = 1 if options.best else options.samples
    if options.backend is None:
        options.backend = "vllm" if options.guidance == 1 else "transformers"
    elif options.backend == "vllm" and options.guidance != 1:
        raise ValueError("--guidance is not in vLLM: leave --backend out, or say --backend transformers")
    jobs, others = files.find_jobs(options.input, options.output, kept)
    disable_progress_bar()  # of loading weights; ours says what there is to know
    checkpoint = policy.find_checkpoint(options.checkpoint, options.image_tokenizer, options.instruction)
    device = _device(options)
    writer = policy.QuestionWriter(checkpoint, device)
    best = None
    if options.best:
        threads = _threads(checkpoint.policy)
        best = experts.expert(options.best, options.samples, options.weights, options.reward_url, device, threads)
    wanted = Wanted(_drawing(options, writer), best, options.save_steps, options.compare, options.skip_existing)
    start = _sampler(options, checkpoint, device, writer.length)
    jobs[0].folder.mkdir(parents=True, exist_ok=True)
    if not os.access(jobs[0].folder, os.W_OK):
        raise ValueError(f"--output: cannot write into {jobs[0].folder}")
    tiles = sum(tiles_of(job, wanted.drawing) for job in jobs)
    return _Plan(jobs, others, checkpoint, wanted, writer, start, Progress(tiles))


def _drawing(options: argparse.Namespace, writer: QuestionWriter) -> Drawing:
    from rl_system.studies.restore.pictures import Drawing

    side = writer.side
    tile = options.tile or side
    overlap = tile // 4 if options.tile_overlap is None else options.tile_overlap
    if not side // 4 <= tile <= 4 * side:
        raise ValueError(
            f"--tile {tile}: this policy draws {side}x{side} pixels; {side // 4} to {4 * side} can be made of it"
        )
    if overlap > tile // 2:
        raise ValueError(f"--tile-overlap {overlap} is more than half of a tile of {tile}")
    steps = writer.steps if options.save_steps else ()
    return Drawing(side, options.upscale, tile, overlap, options.align, options.samples, steps)


def _device(options: argparse.Namespace) -> str:
    """``cpu`` or ``cuda``. Raises ValueError: this machine, or this vLLM, has no such device."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if options.backend == "vllm":
        from vllm.platforms import current_platform

        if current_platform.device_type != device:
            raise ValueError(
                f"--device {device}: the vLLM installed here is for {current_platform.device_type or 'no device'}; "
                "--backend transformers does without"
            )
    return str(device)


def _sampler(options: argparse.Namespace, checkpoint: Checkpoint, device: str, prompt: int) -> Callable[[int], Sampler]:
    from actors.decoding import Decoding
    from actors.spec import RolloutSpec
    from rl_system.doctor.machine import free_memory
    from rl_system.studies.restore import policy
    from rl_system.studies.restore.sampling import TransformersSampler, VllmSampler

    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if options.dtype == "auto" else options.dtype
    room = policy.positions(checkpoint.policy) - prompt
    temperature = options.temperature or checkpoint.temperature
    decoding = Decoding(temperature, options.guidance, options.image_top_k, options.text_top_k)

    def spec(batch: int) -> RolloutSpec:
        sequence = policy.cache_bytes(checkpoint.policy, 4 if dtype == "float32" else 2)
        needed = (max(batch, options.samples) + 1) * sequence  # vLLM keeps some blocks to itself
        return RolloutSpec(
            policy=str(checkpoint.policy),
            image_tokenizer=str(checkpoint.image_tokenizer),
            group_size=options.samples,
            temperature=temperature,
            max_new_tokens=room,
            max_num_seqs=batch,
            kv_cache_gib=min(needed, CPU_CACHE_SHARE * free_memory()) / 2**30 if device == "cpu" else None,
            dtype=dtype,
            seed=options.seed,
            threads=_threads(checkpoint.policy),
            enforce_eager=device == "cpu",
        )

    if options.backend == "transformers":
        return lambda batch: TransformersSampler(spec(batch), device, decoding)
    return lambda batch: VllmSampler(spec(batch), decoding)


def _restore(options: argparse.Namespace, plan: _Plan) -> int:
    from rl_system.studies.restore.run import Batch
    from rl_system.studies.restore.sampling import Queue

    outcomes: list[Outcome] = []
    say = plan.progress.say
    if plan.others:
        say(f"{len(plan.others)} in the input are no pictures by their names: {', '.join(plan.others[:5])}")

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if options.json:
            print(json.dumps(outcome.record(), allow_nan=False), flush=True)
        for note in outcome.notes:
            say(f"{outcome.file}: {note}")
        if outcome.error:
            say(f"{outcome.file}: failed: {outcome.error}")

    def start(batch: int) -> Sampler:
        say(f"starting {options.backend}: {batch} chains at a time")
        return plan.start(batch)

    queue = Queue(start, options.batch, say)
    Batch(plan.jobs, plan.writer, queue, plan.wanted, plan.progress, done).run()
    return _summarise(options, plan, queue.batch, outcomes)


def _summarise(options: argparse.Namespace, plan: _Plan, batch: int, outcomes: list[Outcome]) -> int:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    counts = {status: sum(o.status == status for o in outcomes) for status in ("restored", "skipped", "failed")}
    progress = plan.progress
    if options.json:
        summary = {
            **counts,
            "policy": str(plan.checkpoint.policy),
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "tokens_per_s": round(progress.rate, 1),
            "batch": batch,
            "ignored": plan.others,
        }
        print(json.dumps({"summary": summary}), flush=True)
    rest = f"{progress.tokens:,} tokens in {progress.seconds:.1f} s, {progress.rate:,.0f} a second"
    progress.say(f"{', '.join(f'{count} {status}' for status, count in counts.items())}; {rest}")
    if failed:
        progress.say("failed:\n" + "\n".join(f"  {outcome.file}: {outcome.error}" for outcome in failed))
    return exit_codes.ERROR if failed else exit_codes.OK


def _threads(policy: Path) -> int:
    """All cores, or one for a policy so small that more of them gain little, and lose much on shared cores."""
    from vlcot.policy.family import read_config

    return 1 if read_config(policy)["hidden_size"] < SMALL_HIDDEN_SIZE else len(os.sched_getaffinity(0))


def _upscale(text: str) -> float:
    value = _number(text)
    if not 1 <= value <= MOST_UPSCALE:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to {MOST_UPSCALE:g}")
    return value


def _temperature(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def _guidance(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return value


def _image_top_k(text: str) -> EntropyTopK:
    from actors.decoding import EntropyTopK

    return EntropyTopK() if text == "dynamic" else EntropyTopK(positive(text), positive(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
