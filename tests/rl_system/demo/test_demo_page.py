"""The demo in a real browser with the toy policy: a photograph goes in, steps appear in order, a file comes out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from skimage import data

from rl_system.commands.main import main
from tests.browser import Server, browser

pytestmark = pytest.mark.engine  # starts a browser, and a server with the toy policy
POLICY = Path(__file__).resolve().parents[3] / "toy/weights/policy"
STEPS = ["degradation", "rough_understand", "rough_image", "middle_understand", "middle_image"]
STEPS += ["final_understand", "final_image"]
RECORD = """
const seen = [], said = [];
new MutationObserver(() => {
  const status = document.getElementById("status")?.textContent;
  if (status && said.at(-1) !== status) said.push(status);
  for (const place of document.querySelectorAll("[data-text], [data-image]")) {
    const name = place.dataset.text ?? place.dataset.image;
    const there = place.dataset.text ? place.textContent : place.querySelector("img");
    if (there && !seen.includes(name)) seen.push(name);
  }
  document.documentElement.dataset.seen = seen.join(" ");
  document.documentElement.dataset.said = said.join("|");
}).observe(document, { subtree: true, childList: true, characterData: true });
"""
"""What the page has shown, in order: a fast machine shows it for some tenths of a second."""


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    started = Server(["demo", "--checkpoint", str(POLICY), "--port", "0", "--output", str(output / "results")])
    yield started, output / "results"
    started.stop()


@pytest.fixture
def photograph(tmp_path):
    """A cat of 24x16 pixels, two tiles of the toy at x4."""
    path = tmp_path / "a cat.png"
    Image.fromarray(np.ascontiguousarray(data.cat()[20:280, 30:420])).resize((24, 16), Image.Resampling.BOX).save(path)
    return path


def test_steps_appear_in_order_and_the_download_is_the_restored_file(server, chrome, photograph, tmp_path):
    started, output = server
    page = chrome.new_page(viewport={"width": 1100, "height": 860})
    page.add_init_script(RECORD)
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.goto(started.address)
    page.get_by_label("Choose a photograph").set_input_files(photograph)
    expect(page.get_by_role("region", name="Result")).to_be_visible(timeout=120_000)
    assert page.locator("html").get_attribute("data-seen").split() == STEPS
    said = page.locator("html").get_attribute("data-said").split("|")
    tiles = [status for status in said if "tile" in status]
    assert tiles == ["Restoring: tile 1 of 2", "Restoring: tile 2 of 2"] and said[-1].startswith("Done: ")
    expect(page.get_by_role("img", name="Coarse image, 16 pixels wide")).to_be_visible()
    expect(page.get_by_role("img", name="Final image, 64 pixels wide")).to_be_visible()

    cut = page.get_by_role("slider", name="How much of the picture")
    cut.press("ArrowRight")
    assert "--cut: 51%" in page.locator("#slider").get_attribute("style")
    for name in ("before", "after"):
        picture = page.locator(f"#{name}")
        assert picture.bounding_box()["width"] == 384  # 96 pixels, four times as large
    if folder := os.environ.get("SCREENSHOTS"):
        cut.evaluate("element => element.blur()")
        page.screenshot(path=f"{folder}/demo.png", full_page=True)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a cat_restored.png"
    (written,) = output.glob("*/restored.png")
    assert Path(download.value.path()).read_bytes() == written.read_bytes()
    assert not troubles

    same = ["--backend", "transformers", "--device", "cpu", "--checkpoint", str(POLICY)]
    assert main(["restore", "--input", str(photograph), "--output", str(tmp_path / "r.png"), *same]) == 0
    with Image.open(written) as shown, Image.open(tmp_path / "r.png") as restored:
        assert shown.size == (96, 64) and np.array_equal(np.asarray(shown), np.asarray(restored))


def test_stop_another_photograph_and_files_that_are_none(server, chrome, photograph, tmp_path):
    started, output = server
    larger = tmp_path / "large.png"  # twelve tiles: there is time to stop
    with Image.open(photograph) as small:
        small.resize((48, 32)).save(larger)
    page = chrome.new_page()
    page.goto(started.address)
    (tmp_path / "text.png").write_text("no picture")
    page.get_by_label("Choose a photograph").set_input_files(tmp_path / "text.png")
    expect(page.get_by_role("alert")).to_contain_text("this file is not an image")
    before = len(list(output.iterdir()))
    page.get_by_label("Choose a photograph").set_input_files(larger)
    expect(page.get_by_role("status")).to_contain_text("of 12", timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Restore again").click()
    expect(page.get_by_role("region", name="Result")).to_be_visible(timeout=240_000)
    assert len(list(output.iterdir())) == before + 1  # the one that was stopped left nothing
