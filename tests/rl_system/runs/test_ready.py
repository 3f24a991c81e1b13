"""Groups on disk: what comes back, what is refused, and that damage is never fatal."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from rl_system.runs.group_file import FORMAT, GroupFile, UnreadableGroupError, group_bytes
from rl_system.runs.ready import ReadyGroups
from tests.rl_system.runs.synthetic import scored_group
from vlcot.groups import ScoredGroup

pytestmark = pytest.mark.unit

GROUP = scored_group(3, 1.0, side=16, failed=3)  # of weights 3 and 4
PROMPT = GROUP.group.prompt


def leaves(value, name=""):
    """Every value of a group, by where it stands."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, (tuple, list)):
        yield name, len(value)
        for place, part in enumerate(value):
            yield from leaves(part, f"{name}[{place}]")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{name}.{key}")
    else:
        yield name, value


def assert_same(one: ScoredGroup, other: ScoredGroup) -> None:
    ours, theirs = list(leaves(one)), list(leaves(other))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), name
        else:
            assert a == b and type(a) is type(b), name


def stored(folder: Path, *orders: int, group: ScoredGroup = GROUP) -> ReadyGroups:
    """A store that an attempt has left, with ``group`` under each of these orders."""
    store = ReadyGroups(folder, 0, 0)
    for order in orders:
        store.keep(order, group)
    store.close()
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_group_comes_back_to_the_bit(tmp_path):
    stored(tmp_path, 7)
    again = ReadyGroups(tmp_path, 7, 4)
    assert_same(again.take(7, PROMPT, 3), GROUP)
    assert again.metrics([GROUP, scored_group(4, 1.0, side=16)]) == {"groups/reused": 1.0}
    assert again.take(7, PROMPT, 3) is None  # once in an attempt; the next one finds it again
    assert_same(ReadyGroups(tmp_path, 7, 4).take(7, PROMPT, 3), GROUP)


def test_codes_of_images_come_back_too(tmp_path):
    codes = (np.arange(4, dtype=np.int64).reshape(2, 2), None, np.zeros((4, 4), np.int64))
    sample = replace(GROUP.group.samples[0], chain=replace(GROUP.group.samples[0].chain, images=codes))
    group = replace(GROUP, group=replace(GROUP.group, samples=(sample, *GROUP.group.samples[1:])))
    stored(tmp_path, 0, group=group)
    assert_same(ReadyGroups(tmp_path, 0, 4).take(0, PROMPT, 0), group)


def test_what_a_checkpoint_accounts_for_is_deleted(tmp_path):
    store = ReadyGroups(tmp_path, 2, 0)
    for order in range(2, 6):
        store.keep(order, GROUP)
    store.forget(4)
    store.keep(3, GROUP)  # written late
    store.close()
    assert names(tmp_path) == ["00000004.group", "00000005.group"]
    ReadyGroups(tmp_path, 5, 9)
    assert names(tmp_path) == ["00000005.group"]


def test_tokens_of_weights_that_the_resumed_run_never_had_are_not_trained(tmp_path):
    stored(tmp_path, 0)
    store = ReadyGroups(tmp_path, 0, 3)
    assert store.refused == {"lost_weights": 1} and names(tmp_path) == []
    assert store.take(0, PROMPT, 0) is None


def test_a_group_that_has_become_too_old_is_generated_again(tmp_path):
    stored(tmp_path, 0)
    store = ReadyGroups(tmp_path, 0, 5)
    assert store.take(0, PROMPT, 4) is None and store.refused == {"too_old": 1}
    store.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 104},
        {"group_id": "epoch-1/3"},
        {"degradation": "[heavy blur, light noise]"},
        {"truth": np.zeros((1, 1, 3), np.uint8)},
        {"objects": ("cat",)},
        {"ids": np.ones(3, np.int32)},
        {"ids": np.zeros(3, np.int64)},
        {"lr_image": PROMPT.lr_image.swapaxes(0, 1)},
    ],
    ids=str,
)
def test_a_group_of_another_prompt_is_generated_again(tmp_path, change):
    """As when the data have changed under the run."""
    stored(tmp_path, 0)
    store = ReadyGroups(tmp_path, 0, 4)
    assert store.take(0, replace(PROMPT, **change), 0) is None and store.refused == {"other_prompt": 1}


def test_damage_anywhere_is_noticed(tmp_path):
    """Pitfall: the checksums of an archive do not cover its names: a group came back without an image."""
    data, path, chance = group_bytes(GROUP), tmp_path / "0.group", Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        for content in (damaged, data[: chance.randrange(len(data))]):
            path.write_bytes(content)
            with pytest.raises(UnreadableGroupError):
                GroupFile(path)


def test_damaged_half_written_and_foreign_files_are_counted_and_deleted(tmp_path):
    stored(tmp_path, 0, 1, 2, 3)
    path = tmp_path / "00000001.group"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "00000002.group").write_bytes(b"")
    (tmp_path / ".00000004.group.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("what is this")
    store = ReadyGroups(tmp_path, 0, 4)
    assert store.refused == {"unreadable": 2} and names(tmp_path) == ["00000000.group", "00000003.group"]
    (tmp_path / "00000003.group").unlink()  # between two looks
    assert store.take(3, PROMPT, 0) is None and store.refused == {"unreadable": 3}
    assert_same(store.take(0, PROMPT, 0), GROUP)


def test_a_file_of_another_format_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rl_system.runs.group_file.FORMAT", FORMAT + 1)
    stored(tmp_path, 0)
    monkeypatch.undo()
    assert ReadyGroups(tmp_path, 0, 4).refused == {"unreadable": 1}


def test_a_group_that_cannot_be_written_is_said_and_does_not_end_the_run(tmp_path, caplog):
    odd = replace(GROUP, reward_s={"qwen_vl": float("nan")})
    store = ReadyGroups(tmp_path / "ready", 0, 0)
    store.keep(0, odd)
    store.keep(1, GROUP)
    store.close()
    assert names(tmp_path / "ready") == ["00000001.group"]
    assert "group 0 is not stored; after a stop it would be generated again" in caplog.text


def test_the_last_of_several_writes_stays(tmp_path):
    store = ReadyGroups(tmp_path, 0, 0)
    store.keep(0, scored_group(4, 1.0, side=16))
    store.keep(0, GROUP)
    store.close()
    assert_same(ReadyGroups(tmp_path, 0, 4).take(0, PROMPT, 0), GROUP)
