"""A whole study in a real browser: clicks, keys, undo, a server that goes away and comes back, another computer."""

from __future__ import annotations

import os
import sqlite3
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from rl_system.studies.study.material import order_for
from tests.browser import Server, browser
from tests.rl_system.study.photographs import METHODS, write_folders

pytestmark = pytest.mark.engine  # starts a browser and servers
SEED, IMAGES = 7, 4


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.fixture
def study(tmp_path):
    """Starts the server of one study on ``port``; a server that still runs at the end is stopped."""
    arguments = write_folders(tmp_path, IMAGES, size=128)
    running = []

    def start(port: int = 0) -> Server:
        more = ["--votes", str(tmp_path / "votes.sqlite"), "--seed", str(SEED), "--port", str(port)]
        running.append(Server(["study", "serve", *arguments, *more]))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def listened(page: Page) -> list[str]:
    """Everything the page receives as text, and every address it asks for; errors of scripts end the test."""
    heard: list[str] = []

    def hear(response) -> None:
        heard.append(response.url + str(response.headers))
        if "image" not in response.headers.get("content-type", "image"):
            heard.append(response.text())

    page.on("response", hear)
    page.on("pageerror", lambda error: heard.append(f"SCRIPT ERROR {error}"))
    return heard


def rows(tmp_path) -> list[tuple]:
    """Participant, image and method of each vote, in the order cast."""
    db = sqlite3.connect(tmp_path / "votes.sqlite")
    try:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        join = "vote JOIN method ON method.id = vote.method"
        return db.execute(f"SELECT participant, image, name FROM {join} ORDER BY vote.rowid").fetchall()
    finally:
        db.close()


def shown(page: Page, image: int, votes: int) -> None:
    """Wait until the page shows ``image`` with so many votes cast: what led there is stored."""
    expect(page.get_by_role("region", name=f"Photograph {image} of {IMAGES}")).to_be_visible()
    expect(page.get_by_text(f"{votes} of {IMAGES} chosen")).to_be_visible()
    expect(page.locator("#pictures[aria-busy]")).to_have_count(0)


def test_a_study_from_begin_to_results_with_a_restart_in_the_middle(study, chrome, tmp_path, capfd):
    server = study()
    port = urlsplit(server.address).port
    page = chrome.new_page(viewport={"width": 1120, "height": 520})
    heard = listened(page)
    page.goto(server.address)
    page.get_by_role("button", name="Begin").click()
    shown(page, 1, 0)
    code = parse_qs(urlsplit(page.url).query)["participant"][0]
    order = order_for(code, SEED, IMAGES, len(METHODS))

    def expected(*votes: tuple[int, int]) -> list[tuple]:
        """Rows of votes given as the image and the picture that the participant saw, both from 1."""
        return [(code, order[i - 1][0], METHODS[order[i - 1][1][p - 1]]) for i, p in votes]

    page.get_by_role("button", name="Restoration 2 of 3").click()
    shown(page, 2, 1)
    page.keyboard.press("3")
    shown(page, 3, 2)
    assert rows(tmp_path) == expected((1, 2), (2, 3))
    page.keyboard.press("u")  # back to image 2, which has no vote any more
    shown(page, 2, 1)
    assert rows(tmp_path) == expected((1, 2))
    page.keyboard.press("ArrowLeft")
    shown(page, 1, 1)
    expect(page.get_by_role("button", name="Restoration 2 of 3")).to_have_attribute("aria-pressed", "true")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/study.png")
    page.keyboard.press("1")  # another vote on image 1; goes on to image 2
    shown(page, 2, 1)
    assert rows(tmp_path) == expected((1, 1))

    server.process.kill()  # nothing that was voted on may be lost
    server.stop()
    page.keyboard.press("2")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    server = study(port)
    page.keyboard.press("2")
    shown(page, 3, 2)
    assert rows(tmp_path) == expected((1, 1), (2, 2))

    other = chrome.new_context().new_page()  # another computer: no storage, only the address
    heard += listened(other)
    other.goto(page.url)
    shown(other, 3, 2)
    other.get_by_role("button", name="Restoration 1 of 3").focus()
    other.keyboard.press("Enter")
    shown(other, 4, 3)
    expect(other.get_by_role("region", name="Photograph 4 of 4")).to_be_focused()  # Enter once more votes on nothing
    page.goto(server.address)  # the first computer: no code in the address, only storage
    shown(page, 4, 3)
    page.keyboard.press("3")
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    final = expected((1, 1), (2, 2), (3, 1), (4, 3))
    assert rows(tmp_path) == final

    page.get_by_role("button", name="Someone else begins").click()
    page.get_by_role("button", name="Begin").click()
    shown(page, 1, 0)
    assert rows(tmp_path) == final and code not in page.url
    server.stop()
    assert server.process.returncode == 0

    told = "\n".join(heard).lower()
    assert "/images/4/3" in told and "script error" not in told
    assert not [name for name in (*METHODS, str(tmp_path)) if name.lower() in told]

    from rl_system.commands.main import main

    assert main(["study", "results", "--votes", str(tmp_path / "votes.sqlite"), "--output", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    for method in METHODS:
        votes = sum(row[2] == method for row in final)
        assert f"| Photos | {method} | {votes} | {votes / 4:.1%} |" in printed
    page.goto((tmp_path / "out/results.html").as_uri())
    expect(page.get_by_role("img", name="Photos: share of the votes per method")).to_be_visible()
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/study-results.png")


def test_zoom_fits_and_unknown_participants(study, chrome):
    server = study()
    page = chrome.new_page(viewport={"width": 1000, "height": 700})
    page.goto(f"{server.address}?participant=nobody")
    expect(page.get_by_role("alert")).to_contain_text("a participant whom this study does not know")
    page.get_by_role("button", name="Begin").click()
    shown(page, 1, 0)
    pictures = page.locator("#pictures img")
    boxes = [pictures.nth(i).bounding_box() for i in range(4)]
    assert {(round(b["width"]), round(b["height"])) for b in boxes} == {(round(boxes[0]["width"]),) * 2}
    assert max(b["y"] + b["height"] for b in boxes) < 700
    page.mouse.move(boxes[2]["x"] + boxes[2]["width"] / 2, boxes[2]["y"] + 1)
    page.keyboard.press("z")
    expect(page.get_by_role("button", name="Zoom")).to_have_attribute("aria-pressed", "true")
    zoomed = [pictures.nth(i).bounding_box() for i in range(4)]
    assert [b["width"] for b in zoomed] == pytest.approx([3 * b["width"] for b in boxes], abs=1)
    # The place under the pointer, the middle of the upper edge, stays where it is in every picture.
    assert [b["y"] for b in zoomed] == pytest.approx([b["y"] for b in boxes], abs=3)
    assert [b["x"] + b["width"] / 2 for b in zoomed] == pytest.approx([b["x"] + b["width"] / 2 for b in boxes], abs=3)
