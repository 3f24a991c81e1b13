"""``rl-system demo``: drop a photograph into a page and watch the policy restore it."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.commands.arguments import add_address

PROGRAM = "rl-system demo"


def run(args: list[str]) -> int:
    """Serve the page; returns the exit code: 0 stopped, 1 error, 2 refused."""
    options = _parser().parse_args(args)
    try:
        _serve(options)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except OSError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="A page that restores a photograph and shows the chain of thought as it is written.",
        epilog="The toy, to try it: --checkpoint toy/weights/policy. See docs/demo.md.",
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, type=Path, help="directory of a run (runs/NAME) or of a policy")
    add("--image-tokenizer", metavar="DIR", type=Path, help="default: that of the checkpoint's run")
    add("--instruction", metavar="TEXT", help="the question, with <|image|>; default: that of the checkpoint's run")
    add("--upscale", metavar="X", type=float, default=4.0, help="result over input along a side, 1 to 16; default 4")
    add("--most-tiles", metavar="N", type=int, default=16, help="larger photographs are shrunk first; default 16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add("--output", metavar="DIR", type=Path, help="keeps results; default: a temporary folder, gone at the end")
    add_address(parser, 8322)
    return parser


def _serve(options: argparse.Namespace) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rl_system.studies.demo.app import demo_app
    from rl_system.studies.demo.restoring import Restorer
    from rl_system.studies.restore.policy import find_checkpoint
    from rl_system.studies.web import is_loopback, serve

    if not 1 <= options.upscale <= 16:
        raise ValueError(f"--upscale {options.upscale:g}: a number from 1 to 16")
    if options.most_tiles < 1:
        raise ValueError(f"--most-tiles {options.most_tiles}: a whole number from 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    disable_progress_bar()  # of loading weights
    checkpoint = find_checkpoint(options.checkpoint, options.image_tokenizer, options.instruction)
    restorer = Restorer(checkpoint, options.upscale, device, options.most_tiles)
    with contextlib.ExitStack() as stack:
        output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-system-demo-")))
        output.mkdir(parents=True, exist_ok=True)
        where = f"results in {output}" if options.output else "results are gone at the end"
        serve(
            demo_app(restorer, output, local=is_loopback(options.host)),
            options.host,
            options.port,
            lambda address: print(f"{address}  ({checkpoint.policy} on {device}; {where}; Ctrl-C ends)", flush=True),
        )
