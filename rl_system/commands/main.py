"""``rl-system COMMAND ...``; also ``python -m rl_system``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from rl_system.commands import exit_codes
from rl_system.commands.closed_pipe import replace_stdout

COMMANDS = {
    "train": "train VLCoT-GRPO: rl-system train experiment=toy [KEY=VALUE ...]",
    "doctor": "does this machine hold this experiment: rl-system doctor experiment=toy [--gpus 8x80]",
    "restore": "photographs through a policy: rl-system restore --input DIR --output DIR --checkpoint runs/NAME",
    "evaluate": "the paper's metrics and table: rl-system evaluate --data RealSR=DIR --method NAME=DIR --output DIR",
    "study": "a blind user study in the browser: rl-system study serve --data DATA=DIR --method NAME=DIR ... | results",
    "demo": "a page that restores a photograph step by step: rl-system demo --checkpoint DIR",
    "prepare-data": "photographs into training data: rl-system prepare-data input=DIR output=DIR captions=FILE",
    "cold-start": "supervised training on such data: rl-system cold-start recipe=toy data=DIR [KEY=VALUE ...]",
    "import-weights": "published weights into our format: rl-system import-weights KIND SOURCE OUTPUT",
    "k8s": "the manifests: rl-system k8s check [OVERLAY] | render OVERLAY | submit OVERLAY | logs [POOL] | status",
    "ablate": "the paper's ablations: rl-system ablate study=toy output=DIR photographs=DIR captions=FILE ...",
    "serve-rewards": "reward servers of their own: rl-system serve-rewards start experiment=toy | status | scale | set",
    "simulate": "how fast a run would be: rl-system simulate run RUN_DIRECTORY | cluster --gpus 8 64 1024",
    "status": "what a run is doing, or how it ended: rl-system status RUN_DIRECTORY [--watch]",
    "report": "report.html of a run, also while it runs; of several, side by side: rl-system report RUN_DIRECTORY ...",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to ``rl_system.commands.NAME.run``; returns the exit code.

    Args:
        argv: None: of the process, whose standard output may then be closed by its reader at any time.
    """
    if argv is not None:
        return _dispatch(argv)
    output = replace_stdout()
    try:
        code = _dispatch(sys.argv[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if not output.closed_by_reader:
            raise
        return exit_codes.INTERRUPTED


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print("usage: rl-system COMMAND ...\n\n" + "\n".join(f"  {n:<15} {text}" for n, text in COMMANDS.items()))
        return exit_codes.OK if args else exit_codes.BAD_INPUT
    if args[0] not in COMMANDS:
        print(f"rl-system: unknown command '{args[0]}'; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    command: Callable[[list[str]], int] = import_module(f"rl_system.commands.{args[0].replace('-', '_')}").run
    try:
        return command(args[1:])
    except SystemExit as stop:  # of --help, or of arguments that argparse has already complained about
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
