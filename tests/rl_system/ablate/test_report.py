"""Differences, intervals and verdicts of a study; its pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rl_system.runs.files import write_json
from rl_system.studies.ablate import report, settings
from rl_system.studies.ablate.plan import Plan, Result

pytestmark = pytest.mark.unit
IMAGES = 40


def figures(seed: int, shift: float, seeds: int = 2) -> np.ndarray:
    """float64 [seeds, images]: one level for each image, a shift, and little noise."""
    levels = np.random.default_rng(0).normal(20, 3, IMAGES)
    return levels + shift + np.random.default_rng(seed).normal(0, 0.1, (seeds, IMAGES))


def test_verdicts_follow_the_interval_and_the_direction_of_the_metric():
    table = report.compare(
        {
            name: {"full": figures(1, 0), "worse": figures(2, -0.5), "better": figures(3, 0.5), "same": figures(1, 0)}
            for name in ("PSNR", "LPIPS")
        },
        "full",
    )
    assert [table["PSNR"][v].verdict for v in ("full", "worse", "better", "same")] == [
        "",
        "base better",
        "variant better",
        "no difference shown",
    ]
    assert [table["LPIPS"][v].verdict for v in ("worse", "better")] == ["variant better", "base better"]
    cell = table["PSNR"]["worse"]
    gain, low, high = cell.difference
    expected = (figures(2, -0.5) - figures(1, 0)).mean()
    assert gain == pytest.approx(expected) and low < gain < high < 0
    assert cell.mean == pytest.approx(figures(2, -0.5).mean()) and len(cell.by_seed) == 2


def test_images_without_a_figure_do_not_count_on_either_side():
    base, variant = figures(1, 0), figures(2, 1)
    base[:, 0] = np.nan
    variant[1, 1] = np.nan
    cell = report.compare({"understanding": {"full": base, "other": variant}}, "full")["understanding"]["other"]
    assert cell.difference[0] == pytest.approx((variant.mean(0) - base.mean(0))[2:].mean())


def test_a_figure_that_a_variant_lacks_is_left_out_for_it_only():
    table = report.compare({"generation": {"full": figures(1, 0)}, "format": {"other": figures(1, 0)}}, "full")
    assert table["generation"].keys() == {"full"} and "format" not in table


def test_the_pages_have_every_variant_its_interval_and_pictures(tmp_path: Path):
    for name in ("photographs", "lr", "hr"):
        (tmp_path / name).mkdir()
    output, rng = tmp_path / "out", np.random.default_rng(0)
    config = settings.load(
        [
            *("study=toy", "captions=c", f"photographs={tmp_path / 'photographs'}", f"output={output}"),
            *(f"test_lr={tmp_path / 'lr'}", f"test_hr={tmp_path / 'hr'}", "only=[full,no_grpo,one_step]"),
        ]
    )
    results = [
        Result(n, 0, f"{n}-0", output, None, "after", output / f"{n}-0") for n in ("full", "no_grpo", "one_step")
    ]
    scores = []
    for place, result in enumerate(results):
        result.restored.mkdir(parents=True)
        images = {}
        for number in range(3):
            for folder, side in ((tmp_path / "lr", 16), (tmp_path / "hr", 64), (result.restored, 64)):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            images[f"{number}"] = {"PSNR": 20.0 + number - place, "SSIM": 0.5}
        scores.append({"method": result.method, "images": images})
    (output / "evaluation").mkdir()
    write_json(output / "evaluation" / "scores.json", {"scores": scores})
    page = report.write_report(config, Plan({}, (), tuple(results))).read_text()
    text = (output / "report.md").read_text()
    assert page.count("<img") == 3 * 5 and "one step instead of three" in page and "no format reward" not in page
    assert "| PSNR ↑ | 21.000 | 20.000 **(-1.000, -1.000)** | 19.000 **(-2.000, -2.000)** |" in text
    assert "- no GRPO: better with it: PSNR. no difference shown: SSIM." in text
