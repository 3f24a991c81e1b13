"""``rl-system ... | head``: the reader goes, the command ends and complains to nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rl_system.commands import exit_codes
from rl_system.config.compose import CONFIG_DIR

pytestmark = pytest.mark.unit

PRINTS_MUCH = """
import sys
from rich.console import Console
from rl_system.commands import report
from rl_system.commands.main import main

def run(args):
    try:
        for _ in range(100_000):
            PRINT("much")
    except OSError as error:
        print(error, file=sys.stderr)
    return 0

report.run = run
sys.argv = ["rl-system", "report"]
sys.exit(main())
"""


def unread(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command with a standard output that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=CONFIG_DIR.parent,
            env=os.environ | variables,
            # A shell that runs the tests in the background hands down an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_that_nobody_reads_ends_quietly(unbuffered):
    done = unread("-m", "rl_system", "--help", PYTHONUNBUFFERED=unbuffered)
    assert (done.stderr, done.returncode) == ("", exit_codes.INTERRUPTED)


@pytest.mark.parametrize("how", ["print", "Console().print"])
def test_a_command_takes_it_for_an_interrupt_and_not_for_a_failure_of_its_own(how):
    done = unread("-c", PRINTS_MUCH.replace("PRINT(", f"{how}("))
    assert (done.stderr, done.returncode) == ("", exit_codes.INTERRUPTED)
