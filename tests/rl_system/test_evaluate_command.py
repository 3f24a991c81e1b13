"""``rl-system evaluate`` as a user meets it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from skimage import data

from rl_system.commands.main import main
from tests.vlcot.y_channel import psnr_of_y, ssim_of_y
from vlcot.metrics import METRICS

REALSR = Path(os.environ.get("REALSR", "/work/shared/data/realsr"))
NAMES = ("astronaut", "cat", "coffee")
pytestmark = pytest.mark.engine  # runs the command, with processes of its own


def bicubic(reference: Image.Image) -> Image.Image:
    small = reference.resize((reference.width // 4, reference.height // 4), Image.Resampling.BICUBIC)
    return small.resize(reference.size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photographs():
    return {name: Image.fromarray(np.ascontiguousarray(getattr(data, name)()[100:164, 150:230])) for name in NAMES}


@pytest.fixture
def case(tmp_path, photographs, monkeypatch):
    """Three photographs, their bicubic x4 and themselves as two methods; no weights anywhere."""
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "no-hub"))
    for name, photo in photographs.items():
        for folder, image in (("gt", photo), ("bicubic", bicubic(photo)), ("copy", photo)):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{name}.png")
    return tmp_path


def evaluate(case, *more, methods=("bicubic",), data_set="Toy=gt"):
    name, _, folder = data_set.partition("=")
    given = [part for method in methods for part in ("--method", f"{method}={case}/{method}")]
    data_set = f"{name}={case}/{folder}" if folder else name
    return main(["evaluate", "--data", data_set, *given, "--output", f"{case}/out", "--processes", "1", *more])


def refused(case, capsys, *more, code=2, **options) -> str:
    """The one-line message of an evaluation that wrote nothing."""
    before = sorted(case.rglob("*"))
    assert evaluate(case, *more, **options) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rl-system evaluate: ")]
    assert len(lines) == 1 and sorted(case.rglob("*")) == before
    return lines[0]


def test_values_are_those_of_scikit_image_in_csv_json_and_table(case, photographs, capsys):
    assert evaluate(case, methods=("bicubic", "copy")) == 0
    files = {file.name for file in (case / "out").iterdir()}
    assert files == {"per_image.csv", "scores.json", "table.md", "table.tex", "table.html"}
    expected = {
        n: [f(np.asarray(bicubic(p)), np.asarray(p)) for f in (psnr_of_y, ssim_of_y)] for n, p in photographs.items()
    }
    rows = list(csv.DictReader((case / "out/per_image.csv").open()))
    assert [(row["method"], row["image"]) for row in rows] == [(m, n) for m in ("bicubic", "copy") for n in NAMES]
    for row in rows[:3]:
        assert [float(row["PSNR"]), float(row["SSIM"])] == pytest.approx(expected[row["image"]], abs=1e-4)
        assert row["LPIPS"] == ""
    record = json.loads((case / "out/scores.json").read_text())["scores"]
    means = np.mean(list(expected.values()), axis=0)
    assert list(record[0]["means"].values()) == pytest.approx(means, abs=1e-4)
    assert record[1]["means"]["SSIM"] == 1
    printed = capsys.readouterr()
    assert f"| Toy | PSNR ↑ | <u>{means[0]:.2f}</u> | **80.00** |" in printed.out
    assert "3 images" in printed.out and "6/6 scored" in printed.err


@pytest.mark.skipif(not REALSR.is_dir(), reason="the RealSR pairs are not here")
def test_bicubic_of_realsr_pairs_is_confirmed_by_scikit_image(tmp_path):
    """Two of the forty; docs/evaluate.md has the figure of all."""
    expected = []
    for kind in ("gt", "bicubic"):
        (tmp_path / kind).mkdir()
    for low in sorted((REALSR / "test_LR").glob("*.png"))[::20]:
        reference = Image.open(REALSR / "test_HR" / low.name).convert("RGB")
        result = Image.open(low).convert("RGB").resize(reference.size, Image.Resampling.BICUBIC)
        (tmp_path / "gt" / low.name).symlink_to(REALSR / "test_HR" / low.name)
        result.save(tmp_path / "bicubic" / low.name, compress_level=1)
        expected.append([f(np.asarray(result), np.asarray(reference)) for f in (psnr_of_y, ssim_of_y)])
    assert evaluate(tmp_path, "--metrics", "PSNR,SSIM") == 0
    rows = list(csv.DictReader((tmp_path / "out/per_image.csv").open()))
    assert len(rows) == len(expected) == 2
    for row, values in zip(rows, expected, strict=True):
        assert [float(row["PSNR"]), float(row["SSIM"])] == pytest.approx(values, abs=1e-4)


def test_metrics_without_weights_are_named_in_table_json_and_output(case, capsys):
    assert evaluate(case) == 0
    printed = capsys.readouterr()
    record = json.loads((case / "out/scores.json").read_text())["not_computed"]
    assert set(record) == set(METRICS) - {"PSNR", "SSIM"}
    for name, files in record.items():
        assert files["missing_weights"] == list(METRICS[name].weights)
        assert f"{name} is not computed: {', '.join(METRICS[name].weights)} missing" in printed.err
        arrow = "↓" if METRICS[name].lower_is_better else "↑"
        assert f"| Toy | {name} {arrow} | no weights |" in printed.out
    assert "--weights DIR" in printed.err and "--weights DIR" in printed.out


def test_weights_of_a_folder_are_used_and_recorded(case, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    mean = np.random.default_rng(0).normal(1, 0.2, (1, 36))
    scipy.io.savemat(weights / METRICS["NIQE"].weights[0], {"mu_prisparam": mean, "cov_prisparam": np.eye(36)})
    for name in NAMES:
        photo = Image.fromarray(getattr(data, name)()[:96, :192])
        photo.save(case / "bicubic" / f"{name}.png")
    assert evaluate(case, "--weights", str(weights), data_set="Wild") == 0
    record = json.loads((case / "out/scores.json").read_text())
    assert list(record["scores"][0]["means"]) == ["NIQE"]
    assert list(record["not_computed"]) == ["MUSIQ", "MANIQA", "CLIPIQA", "TOPIQ"]
    assert record["weights"]["niqe_modelparameters.mat"]["path"] == str(weights / "niqe_modelparameters.mat")
    rows = [
        line.split("|")[2].strip()[:-2] for line in (case / "out/table.md").read_text().splitlines() if "Wild |" in line
    ]
    assert rows == ["NIQE", "MANIQA", "MUSIQ", "CLIPIQA", "TOPIQ"]  # the paper's order without references


def test_fid_is_asked_of_exactly_the_paired_images(case, monkeypatch):
    """A stand-in for Inception, whose 2048x2048 matrix root takes too long here."""
    (case / METRICS["FID"].weights[0]).touch()
    (case / "bicubic/notes.txt").write_text("not an image")
    (case / "bicubic/deeper").mkdir()
    shutil.copy(case / "gt/cat.png", case / "bicubic/deeper/dog.png")
    asked = []

    def fid(references, results, **options):
        asked.append(([sorted(p.name for p in Path(folder).iterdir()) for folder in (references, results)], options))
        same = (Path(references) / "cat.png").read_bytes() == (case / "gt/cat.png").read_bytes()
        assert same and (Path(results) / "cat.png").read_bytes() == (case / "bicubic/cat.png").read_bytes()
        return 123.493817

    monkeypatch.setattr("rl_system.studies.evaluate.scoring.load_metric", lambda metric, files: fid)
    assert evaluate(case, "--metrics", "FID", "--weights", str(case)) == 0
    names = [f"{name}.png" for name in NAMES]
    assert asked == [([names, names], {"num_workers": 0, "verbose": False})]
    assert "| Toy | FID ↓ | 123.49 |" in (case / "out/table.md").read_text()


def test_two_data_sets_are_read_from_a_folder_each(case):
    for method in ("bicubic", "copy"):
        for name, images in (("A", NAMES), ("B", NAMES[:2])):
            (case / method / name).mkdir()
            for image in images:
                shutil.copy(case / method / f"{image}.png", case / method / name)
    (case / "gtB").mkdir()
    for image in NAMES[:2]:
        Image.open(case / "gt" / f"{image}.png").save(case / "gtB" / f"{image}.jpg", quality=100, subsampling=0)
    assert evaluate(case, "--data", f"B={case}/gtB", methods=("bicubic", "copy"), data_set="A=gt") == 0
    scores = json.loads((case / "out/scores.json").read_text())["scores"]
    shape = [(s["data_set"], s["method"], len(s["images"])) for s in scores]
    assert shape == [("A", "bicubic", 3), ("A", "copy", 3), ("B", "bicubic", 2), ("B", "copy", 2)]


def test_names_that_do_not_match_are_all_listed(case, capsys):
    (case / "bicubic/cat.png").rename(case / "bicubic/dog.png")
    message = refused(case, capsys)
    assert "(3 images) does not match" in message and "1 missing: cat; 1 extra: dog" in message


def test_without_references_methods_must_have_the_same_names(case, capsys, monkeypatch):
    monkeypatch.setattr("vlcot.metric_weights.find", lambda names, folder: dict.fromkeys(names, Path("x")))
    (case / "copy/cat.png").unlink()
    assert "1 missing: cat" in refused(case, capsys, methods=("bicubic", "copy"), data_set="Wild")


def test_bad_input_is_refused_with_one_line_and_nothing_written(case, capsys):
    def message(*more, **options):
        return refused(case, capsys, *more, **options)

    assert f"there is no folder {case}/nothing" in message(methods=("nothing",))
    assert f"there is no folder {case}/nothing" in message(data_set="Toy=nothing")
    assert "--metrics: no SSSIM; there are PSNR, SSIM, LPIPS" in message("--metrics", "SSSIM")
    assert f"--weights: there is no folder {case}/w" in message("--weights", f"{case}/w")
    assert "--method gives one name twice: copy, copy" in message(methods=("copy", "copy"))
    assert "no metric can be computed (LPIPS: alexnet-owt-7be5be79.pth, " in message("--metrics", "LPIPS")
    assert "NIQE: niqe_modelparameters.mat" in message(data_set="Wild")
    assert "no metric can be computed (PSNR, FID: no data set has references)" in message(
        "--metrics", "FID,PSNR", data_set="Wild"
    )
    (case / "empty").mkdir()
    assert f"there are no images in {case}/empty" in message(methods=("empty",))
    (case / "copy/cat.jpg").touch()
    assert "two images named cat: cat.jpg, cat.png" in message(methods=("copy",))
    (case / "out").mkdir()
    assert f"--output {case}/out exists already" in message()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: Image.open(path).resize((40, 64)).save(path), "cat.png is 40x64, its reference "),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "cannot read the image "),
        (lambda path: path.write_text("not an image"), "cannot read the image "),
        (lambda path: Image.fromarray(np.zeros((64, 80), np.uint16)).save(path), "cat.png has pixels of kind I;16"),
    ],
)
def test_unusable_images_are_refused_before_anything_is_scored(case, capsys, damage, message):
    damage(case / "bicubic/cat.png")
    assert message in refused(case, capsys)


def test_images_too_small_for_a_metric_are_an_error_with_its_name(case, capsys):
    for folder in ("gt", "bicubic"):
        Image.open(case / folder / "cat.png").resize((8, 8)).save(case / folder / "cat.png")
    assert f"SSIM failed on {case}/bicubic/cat.png" in refused(case, capsys, code=1)


def test_gray_and_alpha_are_read_as_rgb(case):
    gray = Image.open(case / "gt/cat.png").convert("L")
    gray.save(case / "gt/cat.png")
    gray.convert("RGBA").save(case / "bicubic/cat.png")
    assert evaluate(case) == 0
    images = json.loads((case / "out/scores.json").read_text())["scores"][0]["images"]
    assert images["cat"]["SSIM"] == 1


def test_arguments_that_are_wrong_end_in_2(case):
    assert evaluate(case, "--processes", "0") == 2
    assert main(["evaluate", "--data", "Toy=", "--method", "a=b", "--output", "c"]) == 2
    assert main(["evaluate", "--help"]) == 0


def test_processes_pass_on_what_an_image_lacks(case, capsys):
    (case / "bicubic/coffee.png").write_text("not an image")
    assert f"cannot read the image {case}/bicubic/coffee.png" in refused(case, capsys, "--processes", "2")
