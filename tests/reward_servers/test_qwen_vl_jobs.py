"""The visual expert's three jobs with planted engines: biased ones, silent ones and ones that talk nonsense."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from reward_servers.caption_chat import CaptionPrompt
from reward_servers.contract import Captions, Judgement, RewardServerError, Tags
from reward_servers.expert_chat import SCORE_NAMES, write_answer
from reward_servers.qwen_vl import RETRY_TEMPERATURE, VisualExpert, VisualExpertConfig
from reward_servers.vlm_engine import Decoding, Reply

pytestmark = pytest.mark.unit

LR = np.zeros((4, 4, 3), np.uint8)
TRUE = [3, 6, 4, 5]


def group(scores=TRUE):
    """Images whose pixels are their true score."""
    return [np.full((8, 8, 3), score, np.uint8) for score in scores]


class Planted:
    """An engine that answers what `reply(images, decoding)` says, and notes what it was asked."""

    def __init__(self, reply):
        self._reply = reply
        self.asked = []

    def render(self, messages):
        return json.dumps(messages)

    async def answer(self, text, images, decoding):
        self.asked.append((text, [np.asarray(image) for image in images], decoding))
        await asyncio.sleep(0)
        reply = self._reply(images, decoding)
        return reply if isinstance(reply, Reply) else Reply(reply, True)


def expert(reply, **settings):
    return VisualExpert(VisualExpertConfig(model="none", **settings), Planted(reply))


def favours_the_first(images, decoding):
    """True scores, but two points more for the image shown first after the reference."""
    shown = [int(np.asarray(image)[0, 0, 0]) for image in images[1:]]
    return write_answer([dict.fromkeys(SCORE_NAMES, s + 2 * (place == 0)) for place, s in enumerate(shown)])


def qualities(server, seed):
    return np.array([j.quality for j in asyncio.run(server.judge(LR, group(), seed))])


def test_a_positional_bias_planted_in_an_expert_is_averaged_out():
    """Once round, every image is first once: all gain alike, so neither their order nor their distances change."""
    true, once = np.array(TRUE, float), expert(favours_the_first, repeats=1)
    for seed in range(4):
        np.testing.assert_allclose(qualities(expert(favours_the_first, repeats=4), seed), true + 2 / 4)
        np.testing.assert_allclose(qualities(expert(favours_the_first, repeats=8), seed), true + 2 / 4)
        assert sorted(qualities(once, seed) - true) == [0, 0, 0, 2], "one request keeps the bias"
    assert len({tuple(qualities(once, seed) - true) for seed in range(8)}) > 1, "it falls on another image each time"


def test_every_repeat_shows_another_order_of_one_group():
    server = expert(favours_the_first, repeats=4)
    asyncio.run(server.judge(LR, group(), 0))
    orders = [tuple(int(image[0, 0, 0]) for image in shown[1:]) for _, shown, _ in server._engine.asked]
    assert len(set(orders)) == 4 and all(sorted(order) == sorted(TRUE) for order in orders)


def reasoned(images, decoding):
    shown = [int(np.asarray(image)[0, 0, 0]) for image in images[1:]]
    return json.dumps({"scores": [dict.fromkeys(SCORE_NAMES, s) | {"rationale": f"it is {s}"} for s in shown]})


def test_a_rationale_is_asked_for_and_stays_with_its_image():
    server = expert(reasoned, rationale=True, repeats=2)
    answers = asyncio.run(server.judge(LR, group(), 0))
    assert answers == [Judgement(s, s, s, f"it is {s}") for s in TRUE]
    text, _, decoding = server._engine.asked[0]
    assert "rationale" in text
    assert decoding.schema["properties"]["scores"]["items"]["required"] == [*SCORE_NAMES, "rationale"]
    without = expert(favours_the_first)
    asyncio.run(without.judge(LR, group(), 0))
    text, _, decoding = without._engine.asked[0]
    assert "rationale" not in text and "rationale" not in json.dumps(decoding.schema)
    assert decoding == Decoding(len(write_answer([dict.fromkeys(SCORE_NAMES, 10)] * 4)) + 8, decoding.schema)


def test_an_unusable_answer_is_asked_again_and_then_an_error():
    server = expert(lambda images, decoding: "I like them all.", retries=2)
    with pytest.raises(RewardServerError, match=r"no usable answer in 3 attempts.*not JSON"):
        asyncio.run(server.judge(LR, group(), 0))
    orders = {tuple(int(image[0, 0, 0]) for image in shown[1:]) for _, shown, _ in server._engine.asked}
    assert len(server._engine.asked) == 3 and len(orders) > 1


def counted(*replies):
    left = iter(replies)
    return lambda images, decoding: next(left)


def test_a_caption_is_a_dialogue_of_three_rounds():
    prompt = CaptionPrompt("Main?", "Parts?", "Texture?", coarse_tokens=5, middle_tokens=6, fine_tokens=7)
    server = expert(counted("A cat.", "Two ears.", Reply("Soft fur. And whisk", False)), caption_prompt=prompt)
    image = np.zeros((16, 16, 3), np.uint8)
    assert asyncio.run(server.caption(image)) == Captions("A cat.", "Two ears.", "Soft fur.")
    texts, shown, decodings = zip(*server._engine.asked, strict=True)
    assert list(decodings) == [Decoding(5), Decoding(6), Decoding(7)]
    assert [[picture.shape[0] for picture in pictures] for pictures in shown] == [[4], [4, 8], [4, 8, 16]]
    assert "A cat." not in texts[0] and "A cat." in texts[1] and "Two ears." not in texts[1]
    assert texts[2].index("Main?") < texts[2].index("A cat.") < texts[2].index("Parts?") < texts[2].index("Two ears.")


def test_an_empty_caption_is_asked_again_and_then_an_error():
    server = expert(counted("A cat.", " ", "Two ears.", "Fur."))
    image = np.zeros((16, 16, 3), np.uint8)
    assert asyncio.run(server.caption(image)) == Captions("A cat.", "Two ears.", "Fur.")
    drawn = [decoding.temperature for _, _, decoding in server._engine.asked]
    assert drawn == [0, 0, RETRY_TEMPERATURE, 0]
    with pytest.raises(RewardServerError, match=r"no usable answer in 2 attempts.*empty"):
        asyncio.run(expert(lambda images, decoding: "", retries=1).caption(image))


def test_tags_are_names_and_nonsense_is_an_error():
    server = expert(counted("nonsense", '{"objects":["Cat","park bench"]}'))
    assert asyncio.run(server.tag(LR)) == Tags(("cat", "park bench"))
    assert [decoding.seed for _, _, decoding in server._engine.asked] == [None, 1]
    with pytest.raises(RewardServerError, match=r"no usable answer in 3 attempts.*not JSON"):
        asyncio.run(expert(lambda images, decoding: "nonsense").tag(LR))
    with pytest.raises(ValueError, match="image must be uint8"):
        asyncio.run(expert(favours_the_first).tag(np.zeros((4, 4), np.uint8)))


def test_settings_change_live_and_fall_back_to_those_of_the_start():
    server = expert(reasoned, repeats=2)
    server.reconfigure({"repeats": 4, "rationale": True, "prompt": {"rubric": "Rate {count}."}})
    assert asyncio.run(server.judge(LR, group(), 0))[0].rationale
    assert len(server._engine.asked) == 4 and "Rate 4." in server._engine.asked[0][0]
    assert server.config.prompt.image_label == "Attempt {index}:", "other parts of the prompt stay"
    server.reconfigure({"rationale": True, "tag_prompt": {"max_names": 3}})
    assert (server.config.repeats, server.config.tag_prompt.max_names) == (2, 3)
    assert "Rate 4." not in server.config.prompt.rubric


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"repeats": 3, "model": "other"}, r"qwen_vl\.model is no live setting"),
        ({"repeats": 3, "colour": 1}, r"qwen_vl\.colour is no live setting"),
        ({"repeats": 3, "retries": -1}, r"qwen_vl\.retries must"),
        ({"repeats": 3, "rationale": "no"}, r"qwen_vl\.rationale must"),
        ({"repeats": 3, "prompt": {"question": "?"}}, r"qwen_vl\.prompt\.question is no live setting"),
        ({"repeats": 3, "prompt": {"rubric": 5}}, r"qwen_vl\.prompt\.rubric must"),
        ({"repeats": 3, "prompt": "Rate."}, r"qwen_vl\.prompt: live settings must be a mapping"),
        ({"repeats": 3, "caption_prompt": {"fine_tokens": 0}}, r"qwen_vl\.caption_prompt\.fine_tokens must"),
        ([("repeats", 3)], "must be a mapping"),
    ],
)
def test_a_refused_change_changes_nothing(settings, why):
    server = expert(reasoned, repeats=2)
    before = server.config
    with pytest.raises(ValueError, match=why):
        server.reconfigure(settings)
    assert server.config is before


def test_a_request_under_way_keeps_its_settings():
    server = expert(counted("not JSON", write_answer([dict.fromkeys(SCORE_NAMES, 1)])), retries=1)

    async def run():
        judging = asyncio.ensure_future(server.judge(LR, group([1]), 0))
        await asyncio.sleep(0)
        server.reconfigure({"retries": 0, "prompt": {"rubric": "New."}})
        return await judging

    assert asyncio.run(run()) == [Judgement(1, 1, 1)]
    assert not any("New." in text for text, _, _ in server._engine.asked)
