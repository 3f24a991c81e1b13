"""``rl-system import-weights``: published checkpoints into our format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rl_system.commands import exit_codes

if TYPE_CHECKING:
    from vlcot.weight_import.convert import Plan
    from vlcot.weight_import.source import Checkpoint

KINDS = {
    "policy": "Lumina-mGPT or PURE (a Hugging Face folder)",
    "vq8": "LlamaGen's vq_ds8_c2i.pt, 8 pixels per code",
    "vq16": "LlamaGen's vq_ds16_c2i.pt, 16 pixels per code",
}
FIRST_TENSORS = {
    "policy": "model.embed_tokens.weight",
    "vq8": "encoder.conv_in.weight",
    "vq16": "encoder.conv_in.weight",
}


def run(args: list[str]) -> int:
    """Import or check; returns the exit code: 0 done, 1 error, 2 refused, 130 interrupted."""
    options = _parser().parse_args(args)
    problem = _contradiction(options)
    if problem:
        print(f"rl-system import-weights: {problem}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    from vlcot.weight_import import convert  # torch is needed from here on
    from vlcot.weight_import.source import Checkpoint, ImportRefused

    try:
        checkpoint = Checkpoint.open(options.source, FIRST_TENSORS[options.kind])
        plan = _plan(options, checkpoint)
        if options.check:
            convert.check(checkpoint, plan, options.output)
            against = f" and equal to {options.output}" if options.output else ""
            print(f"{options.source} is sound{against}: {_counts(plan)}")
        else:
            convert.write(checkpoint, plan, options.output)
            print(f"{options.output}: {_counts(plan)}")
    except ImportRefused as error:
        print(f"rl-system import-weights: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except OSError as error:  # no space, no permission
        print(f"rl-system import-weights: {error}", file=sys.stderr)
        return exit_codes.ERROR
    except KeyboardInterrupt:
        print("rl-system import-weights: interrupted; nothing was left behind", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rl-system import-weights",
        description="Published checkpoints into our format.",
        epilog="\n".join(f"{kind:<8} {text}" for kind, text in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help="what SOURCE is, see below")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder or file of the published weights")
    parser.add_argument("output", metavar="OUTPUT", type=Path, nargs="?", help="folder to write; must not exist")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="policy: text_tokenizer.json with 16,384 codes")
    parser.add_argument(
        "--check", action="store_true", help="write nothing: verify SOURCE and, if OUTPUT is given, compare it"
    )
    return parser


def _contradiction(options: argparse.Namespace) -> str | None:
    if options.output is None and not options.check:
        return "OUTPUT is missing (only --check can do without)"
    if options.kind == "policy" and options.tokenizer is None:
        return "policy needs --tokenizer FILE, the text_tokenizer.json with 16,384 image codes"
    if options.kind != "policy" and options.tokenizer is not None:
        return f"--tokenizer is for policy; {options.kind} has none"
    return None


def _plan(options: argparse.Namespace, checkpoint: Checkpoint) -> Plan:
    if options.kind == "policy":
        from vlcot.weight_import.chameleon import policy_plan

        return policy_plan(checkpoint, options.tokenizer)
    from vlcot.weight_import.llamagen import VQ_8, VQ_16, vq_plan

    return vq_plan({"vq8": VQ_8, "vq16": VQ_16}[options.kind])


def _counts(plan: Plan) -> str:
    return f"{len(plan.conversions)} tensors, {plan.parameters:,} values"
