"""What is said of a batch's progress."""

from __future__ import annotations

import pytest

from rl_system.studies.restore import progress

pytestmark = pytest.mark.unit


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_eta_count_from_the_start_of_the_sampler(clock, capsys):
    shown = progress.Progress(121)
    clock[0] = 130.0  # loading
    shown.started()
    shown.drew(40)
    clock[0] = 140.0
    shown.started()
    shown.wrote(12345)
    assert shown.line() == "tiles 40/121  1,234 tokens/s  ETA 0:20"
    assert capsys.readouterr().err == ""  # no terminal: a line every 15 s
    clock[0] = 145.0
    shown.wrote(0)
    assert capsys.readouterr().err == "tiles 40/121  823 tokens/s  ETA 0:30\n"
    shown.dropped(81)
    assert shown.line() == "tiles 40/40  823 tokens/s"


def test_lines_do_not_run_into_each_other_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = progress.Progress(2)
    shown.started()
    shown.wrote(5)
    shown.say("a message")
    printed = capsys.readouterr().err
    assert printed.startswith("\rtiles 0/2") and printed.endswith("\na message\n")
