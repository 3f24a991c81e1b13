"""What is taken from the input, and what results are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_system.studies.restore.files import find_jobs

pytestmark = pytest.mark.unit


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a b ü.PNG", "notes.txt", ".hidden.png", "inner/b.png", "inner/deep/c.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(jobs):
    return {str(job.source.name): job.name for job in jobs}


def test_a_folder_gives_its_pictures_and_names_the_rest(photos, tmp_path):
    jobs, others = find_jobs([str(photos)], tmp_path / "out", 1)
    assert found(jobs) == {"a b ü.PNG": "a b ü", "b.jpg": "b"}
    assert others == [f"{photos}/inner/", f"{photos}/notes.txt"]
    assert jobs[0].results(1) == (tmp_path / "out/a b ü.png",)
    assert jobs[0].results(2) == (tmp_path / "out/a b ü_1.png", tmp_path / "out/a b ü_2.png")


def test_patterns_keep_the_folders_below_them(photos, tmp_path):
    jobs, _ = find_jobs([f"{photos}/**/*.*"], tmp_path / "out", 1)
    assert [job.name for job in jobs] == ["a b ü", "b", "inner/b", "inner/deep/c"]


def test_a_file_is_taken_whatever_its_name_and_may_have_an_output_file(photos, tmp_path):
    jobs, others = find_jobs([f"{photos}/notes.txt"], tmp_path / "new/result.png", 1)
    assert [job.results(1)[0] for job in jobs] == [tmp_path / "new/result.png"] and not others
    both, _ = find_jobs([f"{photos}/b.jpg", str(photos)], tmp_path / "out", 1)
    assert len(both) == 2  # no picture twice


def test_two_of_one_stem_keep_their_suffixes(photos, tmp_path):
    (photos / "b.webp").touch()
    jobs, _ = find_jobs([str(photos)], tmp_path / "out", 1)
    assert [job.name for job in jobs] == ["a b ü", "b.jpg", "b.webp"]
    assert jobs[1].results(1) == (tmp_path / "out/b.jpg.png",)


def refusal(*args) -> str:
    with pytest.raises(ValueError) as caught:
        find_jobs(*args)
    return str(caught.value)


def test_the_output_may_be_the_input_folder_unless_an_input_would_be_lost(photos, tmp_path):
    jobs, _ = find_jobs([f"{photos}/b.jpg"], photos, 1)
    assert jobs[0].results(1) == (photos / "b.png",)
    (photos / "b.png").touch()
    assert refusal([str(photos / "b.png")], photos, 1).endswith("b.png would overwrite an input; give another folder")
    (tmp_path / "link").symlink_to(photos)
    assert "would overwrite an input" in refusal([str(photos / "b.png")], tmp_path / "link", 1)
    assert find_jobs([str(photos / "b.png")], photos, 2)[0]  # b_1.png and b_2.png


def test_what_cannot_be_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    assert refusal(["nowhere"], out, 1) == "--input: there is no nowhere"
    (tmp_path / "empty").mkdir()
    assert "there is no picture in" in refusal([str(tmp_path / "empty")], out, 1)
    assert "there is no picture in" in refusal([f"{photos}/*.gif"], out, 1)
    assert "but there are 2 inputs" in refusal([str(photos)], tmp_path / "one.png", 1)
    assert "results are written as PNG" in refusal([f"{photos}/b.jpg"], tmp_path / "one.jpg", 1)
    for name in ("y/same.png", "z/same.png"):
        (photos / name).parent.mkdir()
        (photos / name).touch()
    assert "would be the result of both" in refusal([f"{photos}/y", f"{photos}/z"], out, 1)


def test_an_unreadable_folder_is_refused_by_name(photos, tmp_path, monkeypatch):
    """As root no folder is unreadable, so that the system's answer is played."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal([str(photos)], tmp_path / "out", 1) == f"--input: cannot read {photos}: Permission denied"
