"""Shares and intervals against literal figures, and the command around them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rl_system.commands.main import main
from rl_system.studies.study.material import Item, Material
from rl_system.studies.study.results import ALL, results_of, share, to_text, write_results
from rl_system.studies.study.votes import Tally, VoteBook, tallies
from tests.rl_system.study.photographs import write_folders

pytestmark = pytest.mark.unit
NAMES = ("ours", "<b>other|</b>")


def test_wilson_intervals_are_those_of_the_formula():
    # (k + z^2/2 +- z sqrt(k (n-k)/n + z^2/4)) / (n + z^2), z = 1.959964, by hand for 10 of 20; 0 of 10 is z^2/(n+z^2).
    half = share(10, 20)
    assert (half.share, half.low, half.high) == pytest.approx((0.5, 0.299298, 0.700702), abs=1e-6)
    none = share(0, 10)
    assert (none.share, none.low, none.high) == pytest.approx((0, 0, 3.841459 / 13.841459), abs=1e-6)
    assert share(0, 0).share is None


@pytest.fixture
def votes(tmp_path):
    """Two data sets of 2 and 1 images; one participant votes on all, one on one image, one on none."""
    items = [Item(data_set, name, tmp_path, (tmp_path,) * 2) for data_set, name in (("A", "x"), ("A", "y"), ("B", "x"))]
    book = VoteBook(tmp_path / "votes.sqlite", Material(NAMES, tuple(items), ("0",) * 3), seed=0)
    first, second, _ = (book.new_participant() for _ in range(3))
    for code, item, method in ((first, 0, 0), (first, 1, 1), (first, 2, 0), (second, 0, 1), (second, 0, 0)):
        book.cast(code, item, method)
    yield tmp_path / "votes.sqlite"
    book.close()


def test_votes_are_counted_while_the_study_goes_on(votes):
    found, each = tallies(votes)
    assert found == [Tally("A", 2, dict(zip(NAMES, (2, 1), strict=True))), Tally("B", 1, {NAMES[0]: 1, NAMES[1]: 0})]
    results = results_of(found, each)
    assert (results.images, results.participants, results.complete) == (3, 2, 1)
    assert [results.shares[d][NAMES[0]].votes for d in ("A", "B", ALL)] == [2, 1, 3]
    assert results.shares[ALL][NAMES[0]].share == 0.75


def test_results_command_writes_table_page_and_json(votes, tmp_path, capsys):
    command = ["study", "results", "--votes", str(votes), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| All data sets | ours | 3 | 75.0% | 30.1%–95.4% |" in printed
    assert "4 votes of 2 participants on 3 images; 1 voted on every image." in printed
    page = (tmp_path / "out/results.html").read_text()
    assert page.count("<svg") == 3 and "&lt;b&gt;other|&lt;/b&gt;" in page and "<b>other" not in page
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["shares"]["A"]["ours"]["votes"] == 2 and record["complete"] == 1
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


def test_a_data_set_without_votes_has_no_share(tmp_path):
    found = [Tally("A", 1, {"m": 1, "n": 0}), Tally("B", 1, {"m": 0, "n": 0})]
    results = results_of(found, Counter([1]))
    assert "| B | m | 0 | – | – |" in to_text(results)
    write_results(tmp_path / "out", results)
    assert "No vote yet." in (tmp_path / "out/results.html").read_text()
    assert json.loads((tmp_path / "out/results.json").read_text())["shares"]["B"]["m"]["share"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, root: [*a, "--method", f"bicubic={root}/nearest"], "--method gives one name twice"),
        (lambda a, root: [*a, "--method", "extra"], "--method extra has no folder"),
        (lambda a, root: ["--data", "Photos", *a[2:]], "--data Photos has no folder"),
        (lambda a, root: [*a, "--method", f"extra={root}/nowhere"], "there is no folder"),
        (lambda a, root: a[:4], "2 to 9 methods"),
        (lambda a, root: [*a, "--seed", "-1"], "--seed -1"),
        (lambda a, root: [*a, "--port", "70000"], "'70000' is not a port"),
        (lambda a, root: [*a, "--votes", f"{root}/nowhere/v.sqlite"], "cannot open"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(change, message, tmp_path, capsys):
    arguments = change(write_folders(tmp_path, number=1, size=8), tmp_path)
    votes = [] if "--votes" in arguments else ["--votes", f"{tmp_path}/v.sqlite"]
    assert main(["study", "serve", *arguments, *votes]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "v.sqlite").exists()


def test_results_of_nothing_are_refused(tmp_path, capsys):
    for path, message in ((tmp_path / "none", "there is no file"), (tmp_path, "there is no file")):
        assert main(["study", "results", "--votes", str(path), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    book = VoteBook(tmp_path / "v", Material(NAMES, (Item("A", "x", tmp_path, (tmp_path,) * 2),), ("0",)), None)
    book.close()
    assert main(["study", "results", "--votes", str(tmp_path / "v"), "--output", str(tmp_path / "out")]) == 2
    assert "holds no vote yet" in capsys.readouterr().err
