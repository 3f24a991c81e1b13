"""The journal, and files that go on behind a step."""

from __future__ import annotations

import json

import pytest

from rl_system.coordination.ledger import BatchRecord
from rl_system.runs.files import cut_json_lines
from rl_system.runs.journal import Journal, read_journal

pytestmark = pytest.mark.unit

RECORDS = [
    BatchRecord(1, {0: "epoch-0/a", 2: "epoch-0/c"}, {1: ("epoch-0/b", "qwen_vl gave no answer")}),
    BatchRecord(2, {3: "epoch-0/d", 4: "epoch-0/e"}),
    BatchRecord(3, {5: "epoch-0/f", 6: "epoch-0/g"}),
]


def written(path, done=0, records=RECORDS):
    journal = Journal(path, done)
    for record in records:
        journal.write(record)
    journal.close()


def test_what_is_written_is_read_back_up_to_the_steps_done(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    assert read_journal(path, 3) == RECORDS and read_journal(path, 1) == RECORDS[:1] and read_journal(path, 0) == []
    assert read_journal(tmp_path / "none", 0) == []


def test_a_later_attempt_takes_the_place_of_what_it_makes_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with path.open("a") as file:
        file.write('{"step": 4, "ro')  # killed while it wrote
    again = BatchRecord(2, {3: "epoch-0/d", 5: "epoch-0/f"}, {4: ("epoch-0/e", "chance")})
    written(path, done=1, records=[again])
    assert read_journal(path, 2) == [RECORDS[0], again]


def test_steps_that_are_missing_are_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path, records=[RECORDS[0], RECORDS[2]])
    with pytest.raises(ValueError, match="has done 3 steps, and this file has the rows of steps 1, 3"):
        read_journal(path, 3)
    with pytest.raises(ValueError, match="of steps none"):
        read_journal(tmp_path / "none", 1)


def test_a_cut_keeps_the_rest_of_every_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1e-05, "y": null}\n{"step": 2}\n{"st')
    cut_json_lines(path, lambda line: line["step"] < 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "x": 1e-05, "y": None}]
