"""``rl-system ablate``: the paper's tables 2 to 5."""

from __future__ import annotations

import sys

from rl_system.commands import exit_codes

PROGRAM = "rl-system ablate"
_USAGE = f"""\
usage: {PROGRAM} study=toy|realsr_r1_7b output=DIR photographs=DIR captions=FILE test_lr=DIR test_hr=DIR [KEY=VALUE ...]
       --plan   print the commands and run nothing
See docs/ablate.md."""


def run(args: list[str]) -> int:
    """Run what is not done yet; returns the exit code: 0 done, 1 a stage failed, 2 bad configuration, 75 a stage was
    stopped and goes on with the same command, 130 interrupted."""
    from rl_system.config.compose import ConfigError
    from rl_system.studies.ablate import settings
    from rl_system.studies.ablate.plan import make_plan
    from rl_system.studies.ablate.report import write_report
    from rl_system.studies.ablate.run import StageFailed, run_stages, write_layouts

    if any(arg in ("-h", "--help") for arg in args):
        print(_USAGE)
        return exit_codes.OK
    try:
        config = settings.load([arg for arg in args if arg != "--plan"])
        plan = make_plan(config)
        if "--plan" in args:
            print("\n".join(" ".join(["rl-system", *stage.command]) for stage in plan.stages))
            return exit_codes.OK
        write_layouts(config, plan)
        run_stages(config, plan, lambda text: print(text, flush=True))
        print(f"report: {write_report(config, plan)}")
    except (ConfigError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except StageFailed as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.STOPPED if error.code == exit_codes.STOPPED else exit_codes.ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK
