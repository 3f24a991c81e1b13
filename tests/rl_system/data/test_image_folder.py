"""Rows of a folder of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rl_system.config.checks import check
from rl_system.config.compose import CONFIG_DIR, compose_config
from rl_system.data.prompts import training_prompts
from rl_system.data.rows import ImageFolder, Row

pytestmark = pytest.mark.unit

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photographs of noise in two folders, each of its own colour, with tags beside them."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        path = root / "images" / f"{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 20, (72, 80, 3), dtype=np.uint8)
        pixels[:, :, 0] = 10 * index
        Image.fromarray(pixels).save(path)
        tags = root / "tags" / f"{index % 2}" / f"{index:02d}.txt"
        tags.parent.mkdir(parents=True, exist_ok=True)
        tags.write_text(f"Photo  {index}, cat,, cat \nsecond line\n" if index else "")
    return root


def of_folder(root: Path, tags: bool = True, seed: int = 0) -> ImageFolder:
    return ImageFolder(str(root / "images"), 64, seed, str(root / "tags") if tags else None)


def name_of(row: Row) -> str:
    return row.row_id.split("#")[0]


def test_rows_are_random_access_and_seeded(folder):
    first, again, other = (of_folder(folder, seed=seed).row(3, "train") for seed in (0, 0, 1))
    assert first.hq.shape == (64, 64, 3) and first.lr.shape == (16, 16, 3)
    assert np.array_equal(first.hq, again.hq) and np.array_equal(first.lr, again.lr)
    assert name_of(first) == name_of(other) and not np.array_equal(first.lr, other.lr)


def test_the_splits_share_no_image_and_a_new_image_moves_none(folder, tmp_path):
    source = of_folder(folder)
    names = {split: {name_of(source.row(i, split)) for i in range(COUNT)} for split in ("train", "heldout")}
    assert not names["train"] & names["heldout"] and len(names["train"] | names["heldout"]) == COUNT
    larger = tmp_path / "images"
    for path in (folder / "images").rglob("*.png"):
        target = larger / path.relative_to(folder / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    Image.new("RGB", (64, 64)).save(larger / "00.png")
    after = ImageFolder(str(larger), 64, 0)
    assert names["train"] <= {name_of(after.row(i, "train")) for i in range(COUNT + 1)}


def test_tags_are_the_first_line_of_the_file_of_the_same_name(folder):
    source = of_folder(folder)
    for split in ("train", "heldout"):
        for index in range(COUNT):
            row = source.row(index, split)
            number = int(name_of(row).split("/")[1].removesuffix(".png"))
            assert row.objects == ((f"photo {number}", "cat") if number else ())
            assert abs(int(np.median(row.hq[:, :, 0])) - 10 * number) <= 1
    assert of_folder(folder, tags=False).row(0, "train").objects is None


def test_missing_or_unreadable_tags_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tags of .*00\.png.*No such file"):
        ImageFolder(str(folder / "images"), 64, 0, str(tmp_path))
    (tmp_path / "0").mkdir()
    (tmp_path / "0/00.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"cannot read the tags of .*00\.png.*utf-8"):
        ImageFolder(str(folder / "images"), 64, 0, str(tmp_path))


def test_prompts_carry_what_the_data_name(folder):
    class Builder:
        def build(self, row: Row, group_id: str, seed: int) -> Row:
            return row

    source = of_folder(folder)
    prompt = next(training_prompts(source, Builder(), 1, seed=0))
    assert prompt.row_id.startswith("epoch-0/") and prompt.objects == source.row(0, "train").objects


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=folder", "data.path=x", "reward=objects_file"], "reward.objects=file needs data.tags=DIR"),
        (["data.tags=x"], "data.tags=x belongs to data=folder; data.source=toy_photographs names its objects"),
        (["reward.objects=ram"], "reward.objects=ram is not known; allowed: grounded_sam, tagged_grounded_sam"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(monkeypatch, overrides, said):
    monkeypatch.chdir(CONFIG_DIR.parent)
    with pytest.raises(ValueError) as error:
        check(compose_config(["experiment=toy", *overrides]))
    assert said in str(error.value)
