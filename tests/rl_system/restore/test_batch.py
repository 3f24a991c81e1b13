"""Whole batches with a stand-in for the sampler: whatever the files are, and whatever goes wrong."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from rl_system.studies.restore import images
from rl_system.studies.restore.experts import agreement, likelihood
from rl_system.studies.restore.files import find_jobs
from rl_system.studies.restore.pictures import Drawing
from rl_system.studies.restore.progress import Progress
from rl_system.studies.restore.run import ATTEMPTS, Batch, Wanted
from rl_system.studies.restore.sampling import OutOfMemory, Queue
from tests.rl_system.restore.standin import SIDE, TOKENS, StandInSampler, StandInWriter

pytestmark = pytest.mark.unit
PHOTO = np.ascontiguousarray(data.cat()[60:110, 100:160])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class Run:
    """One batch over a folder; what it said and did."""

    def __init__(self, source: Path, output: Path, *samplers: StandInSampler, batch=8, wanted=None, **drawing) -> None:
        settings = {"side": SIDE, "upscale": 2.0, "tile": SIDE, "overlap": 16, "align": "none"}
        wanted = {"drawing": Drawing(**{**settings, **drawing}), **(wanted or {})}
        self.wanted = Wanted(**wanted)
        self.said: list[str] = []
        self.outcomes = {}
        self.samplers = list(samplers) or [StandInSampler(self.wanted.drawing.samples)]
        self.batches: list[int] = []
        jobs, _ = find_jobs([str(source)], output, self.wanted.kept)
        queue = Queue(self.start, batch, self.said.append)
        Batch(jobs, StandInWriter(), queue, self.wanted, Progress(0), self.done).run()

    def start(self, batch: int) -> StandInSampler:
        self.batches.append(batch)
        sampler = self.samplers[len(self.batches) - 1]
        if isinstance(sampler, Exception):
            raise sampler
        return sampler

    def done(self, outcome) -> None:
        json.dumps(outcome.record(), allow_nan=False)
        name = Path(outcome.file).name
        assert name not in self.outcomes
        self.outcomes[name] = outcome

    def status(self) -> dict[str, str]:
        return {name: outcome.status for name, outcome in self.outcomes.items()}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(PHOTO).save(folder / name)
    return folder


def bicubic(image: np.ndarray, upscale: float) -> np.ndarray:
    size = round(image.shape[1] * upscale), round(image.shape[0] * upscale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("upscale", [1, 2, 2.5, 4])
def test_a_sampler_that_copies_gives_the_bicubic_picture(photos, tmp_path, upscale):
    """Tiles lie where they should, the size is exact, and nothing is added on the way."""
    run = Run(photos, tmp_path / "out", upscale=upscale)
    assert set(run.status().values()) == {"restored"} and run.samplers[0].closed
    expected = bicubic(PHOTO, upscale)
    result = pixels(tmp_path / "out/a.png")
    assert result.shape == expected.shape
    if min(expected.shape[:2]) >= SIDE:
        assert np.abs(result.astype(int) - expected).max() <= 1
    else:  # drawn larger, then shrunk
        assert np.abs(result.astype(int) - expected).mean() < 3
    outcome = run.outcomes["a.png"]
    assert outcome.output_size == (expected.shape[1], expected.shape[0]) and outcome.input_size == (60, 50)
    assert outcome.tokens == TOKENS * outcome.tiles


def test_tiles_of_other_sizes_than_the_policys(photos, tmp_path):
    for tile in (32, 100):
        Run(photos, tmp_path / str(tile), upscale=4, tile=tile, overlap=tile // 4)
        difference = pixels(tmp_path / str(tile) / "a.png").astype(int) - bicubic(PHOTO, 4)
        assert np.abs(difference).mean() < 2


def zoo(folder: Path) -> None:
    image, gray = Image.fromarray(PHOTO), Image.fromarray(PHOTO[..., 0])
    alpha = Image.fromarray(np.linspace(0, 255, 50 * 60).reshape(50, 60).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(PHOTO[:1, :1]).save(folder / "one.png")
    image.resize((5000, 17)).save(folder / "long.png")
    Image.merge("RGBA", [*image.split(), alpha]).save(folder / "rgba.png")
    Image.merge("LA", [gray, alpha]).save(folder / "la.png")
    image.quantize(16).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    (folder / "deep.png").write_bytes(cv2.imencode(".png", PHOTO[..., ::-1].astype(np.uint16) * 257)[1].tobytes())
    image.save(folder / "progressive.jpg", progressive=True, quality=95, icc_profile=SRGB)
    image.save(folder / "rotated.jpg", exif=exif, quality=95)
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "web.webp", lossless=True)
    (folder / "cut.png").write_bytes((folder / "rgba.png").read_bytes()[:-2000])
    (folder / "text.png").write_text("no picture")
    for name in ("a name with spaces, ü and 写真.png", os.fsdecode(b"not UTF-8 \xff.png")):
        image.save(folder / name)
    (folder / "folder.png").mkdir()


def test_the_zoo(tmp_path):
    """Each kind of file in one batch: a right result, or a message; and the others do not suffer."""
    folder, out = tmp_path / "zoo", tmp_path / "out"
    folder.mkdir()
    zoo(folder)
    run = Run(folder, out, wanted={"save_steps": True})
    failed = {name: outcome.error for name, outcome in run.outcomes.items() if outcome.status != "restored"}
    assert failed.keys() == {"cut.png", "text.png"}
    assert "truncated" in failed["cut.png"] and failed["text.png"] == "is not an image"
    expected = bicubic(PHOTO, 2).astype(int)

    def difference(name: str, wanted: np.ndarray = expected) -> float:
        return np.abs(pixels(out / f"{name}.png")[..., :3].astype(int) - wanted).mean()

    assert pixels(out / "one.png").shape == (2, 2, 3) and np.abs(pixels(out / "one.png") - PHOTO[:1, :1]).max() == 0
    assert pixels(out / "long.png").shape == (34, 10000, 3)
    assert max(map(difference, ("rgba", "web", "a name with spaces, ü and 写真", os.fsdecode(b"not UTF-8 \xff")))) < 0.6
    assert max(difference(n) for n in ("progressive", "cmyk", "palette", "animated")) < 12
    assert difference("rotated", np.rot90(expected, -1)) < 4
    with Image.open(out / "la.png") as la, Image.open(out / "rgba.png") as rgba:
        assert (la.mode, rgba.mode, la.size) == ("LA", "RGBA", (120, 100))
        ramp = bicubic(np.asarray(Image.open(folder / "la.png").getchannel("A")), 2).astype(int)
        assert max(np.abs(np.asarray(i.getchannel("A")).astype(int) - ramp).max() for i in (la, rgba)) <= 1
    deep = images.read_photograph(out / "deep.png")
    assert deep.bits == 16 and np.abs(deep.colour / 257 - expected).mean() < 0.6
    assert images.read_photograph(out / "progressive.png").profile == SRGB
    assert run.outcomes["animated.gif"].notes == ["only the first of 2 frames is restored"]


def test_results_do_not_depend_on_what_else_is_in_the_batch(photos, tmp_path):
    def noisy(view, seed, number):
        return np.random.default_rng(seed).integers(0, 256, view.shape, dtype=np.uint8)

    Run(photos, tmp_path / "all", StandInSampler(draw=noisy, batch=3))
    Run(photos / "b.png", tmp_path / "alone", StandInSampler(draw=noisy))
    assert (tmp_path / "all/b.png").read_bytes() == (tmp_path / "alone/b.png").read_bytes()


def test_out_of_memory_makes_the_batch_smaller_and_loses_nothing(photos, tmp_path):
    run = Run(
        photos, tmp_path / "out", StandInSampler(dies_after=4), OutOfMemory("no start"), StandInSampler(), batch=32
    )
    assert run.batches == [32, 8, 2] and run.samplers[0].closed
    assert run.said == ["no memory is left; going on with --batch 8", "no start; going on with --batch 2"]
    assert set(run.status().values()) == {"restored"}
    asked = [p.group_id for p in run.samplers[0].prompts]
    again = [p.group_id for p in run.samplers[2].prompts]
    assert len(set(asked) & set(again)) == len(asked) - 4 and len(again) == len(set(again))
    assert np.abs(pixels(tmp_path / "out/c.png").astype(int) - bicubic(PHOTO, 2)).max() <= 1


def test_without_any_memory_every_picture_fails_with_the_reason(photos, tmp_path):
    run = Run(photos, tmp_path / "out", *[OutOfMemory("nothing fits")] * 3, batch=8)
    assert run.batches == [8, 2, 1] and set(run.status().values()) == {"failed"} and len(run.outcomes) == 3
    assert {o.error for o in run.outcomes.values()} == {"nothing fits; nothing smaller is left than one tile at a time"}
    one_by_one = StandInSampler(batch=1, dies_after=6)  # a picture has six tiles
    run = Run(photos, tmp_path / "out", one_by_one, batch=1)
    assert run.status() == {"a.png": "restored", "b.png": "failed", "c.png": "failed"}


def test_a_chain_that_is_not_complete_is_asked_for_again(photos, tmp_path):
    def fails(prompt, number):
        return prompt.seed == 2 or (number == 1 and prompt.seed >> 32 < 2 and prompt.seed % 2**32 == 1)

    run = Run(photos / "a.png", tmp_path / "out", StandInSampler(2, fails=fails), samples=2)
    outcome = run.outcomes["a.png"]
    assert outcome.status == "restored" and outcome.retries == 1 + 2
    assert outcome.tokens == TOKENS * 2 * (outcome.tiles + outcome.retries)


def test_a_tile_that_never_comes_fails_its_picture_alone(photos, tmp_path):
    run = Run(photos, tmp_path / "out", StandInSampler(fails=lambda p, _: p.group_id.startswith("1/3/")))
    assert run.status() == {"a.png": "restored", "b.png": "failed", "c.png": "restored"}
    assert run.outcomes["b.png"].error == f"tile 3: the policy wrote no complete chain in {ATTEMPTS} attempts (broken)"
    assert not (tmp_path / "out/b.png").exists()


def test_what_is_there_already_is_left_alone(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.png").write_text("mine")
    run = Run(photos, tmp_path / "out", wanted={"skip_existing": True})
    assert run.status() == {"a.png": "restored", "b.png": "skipped", "c.png": "restored"}
    assert (tmp_path / "out/b.png").read_text() == "mine"
    never = Run(photos, tmp_path / "out", RuntimeError("no engine may start"), wanted={"skip_existing": True})
    assert set(never.status().values()) == {"skipped"} and never.batches == []


def test_a_result_that_cannot_be_written_fails_alone(photos, tmp_path):
    (tmp_path / "out/b.png").mkdir(parents=True)
    run = Run(photos, tmp_path / "out")
    assert run.status() == {"a.png": "restored", "b.png": "failed", "c.png": "restored"}
    assert "IsADirectoryError" in run.outcomes["b.png"].error


def test_a_picture_that_memory_cannot_hold_is_refused(photos, tmp_path, monkeypatch):
    Image.fromarray(PHOTO[:20, :20]).save(photos / "small.png")
    monkeypatch.setattr("rl_system.studies.restore.run.free_memory", lambda: 0.5e6)
    run = Run(photos, tmp_path / "out")
    assert run.status() == {"a.png": "failed", "b.png": "failed", "c.png": "failed", "small.png": "restored"}
    assert run.outcomes["a.png"].error.startswith("a result of 120x100 pixels needs about")


def test_pictures_are_opened_as_room_comes(photos, tmp_path):
    sampler = StandInSampler(batch=2)
    Run(photos, tmp_path / "out", sampler)
    assert sampler.most_open == 2


def test_every_sample_or_the_best(photos, tmp_path):
    def darker(view, seed, number):
        return (view * (1 - 0.1 * ((number + 1) % 3))).astype(np.uint8)

    source = photos / "a.png"
    run = Run(source, tmp_path / "all", StandInSampler(3, draw=darker), samples=3)
    means = [pixels(Path(path)).mean() for path in run.outcomes["a.png"].outputs]
    assert [Path(p).name for p in run.outcomes["a.png"].outputs] == ["a_1.png", "a_2.png", "a_3.png"]
    assert means[2] > means[0] > means[1]
    for name, best, chosen in (
        ("agreement", lambda results, source, chains: [agreement(result, source) for result in results], 3),
        ("likelihood", lambda results, source, chains: [likelihood(of) for of in chains], 1),
    ):
        run = Run(source, tmp_path / name, StandInSampler(3, draw=darker), samples=3, wanted={"best": best})
        outcome = run.outcomes["a.png"]
        assert outcome.chosen == chosen and outcome.scores[chosen - 1] == max(outcome.scores)
        assert (tmp_path / name / "a.png").read_bytes() == (tmp_path / f"all/a_{chosen}.png").read_bytes()


def test_steps_and_strip(photos, tmp_path):
    Run(photos / "a.png", tmp_path / "out", steps=("coarse", "middle"), wanted={"compare": True, "save_steps": True})
    steps = tmp_path / "out/steps/a"
    assert pixels(steps / "coarse.png").shape == (25, 30, 3) and pixels(steps / "middle.png").shape == (50, 60, 3)
    assert np.abs(pixels(steps / "middle.png").astype(int) - PHOTO).mean() < 4
    chains = json.loads((steps / "chains.json").read_text())
    assert [(t["top"], t["left"]) for t in chains["tiles"]] == [(y, x) for y in (0, 36) for x in (0, 28, 56)]
    assert chains["tiles"][0]["chains"] == [
        {
            "sample": 1,
            "degradation": "blur",
            "coarse": "a cat",
            "middle": "a gray cat",
            "final": "a gray cat sits",
            "tokens": 10,
        }
    ]
    strip = pixels(tmp_path / "out/compare/a.png")
    assert strip.shape == (100, 244, 3)
    np.testing.assert_array_equal(strip[:, :120], bicubic(PHOTO, 2))
    np.testing.assert_array_equal(strip[:, 124:], pixels(tmp_path / "out/a.png"))


@pytest.mark.parametrize("align", ["wavelet", "adain"])
def test_alignment_takes_away_what_tiles_differ_in(photos, tmp_path, align):
    """A sampler that colours each tile at random: aligned, the picture has the input's colours and no steps."""

    def tinted(view, seed, number):
        return np.clip(view * np.random.default_rng(seed).uniform(0.6, 1.4, 3), 0, 255).astype(np.uint8)

    expected = bicubic(PHOTO, 4).astype(int)
    errors = {}
    for kind in ("none", align):
        Run(photos / "a.png", tmp_path / kind, StandInSampler(draw=tinted), upscale=4, align=kind)
        errors[kind] = np.abs(pixels(tmp_path / kind / "a.png") - expected).mean()
    assert errors["none"] > 10 and errors[align] < 3


def test_the_chosen_score_never_falls_with_more_samples(photos, tmp_path):
    def noisy(view, seed, number):
        deviation = (30, 20, 40, 25, 35, 10, 40, 40)[number % 8]
        noise = np.random.default_rng([seed, number]).normal(0, deviation, view.shape)
        return np.clip(view + noise, 0, 255).astype(np.uint8)

    scores = []
    for count in (2, 4, 8):
        sampler = StandInSampler(count, draw=noisy)
        best = {"best": lambda results, source, chains: [agreement(result, source) for result in results]}
        run = Run(photos / "a.png", tmp_path / str(count), sampler, samples=count, wanted=best)
        outcome = run.outcomes["a.png"]
        scores.append(outcome.scores)
        assert outcome.scores[outcome.chosen - 1] == max(outcome.scores)
    for few, many in pairwise(scores):
        assert many[: len(few)] == few  # the same samples, and more
    assert max(scores[-1]) > max(scores[0])
