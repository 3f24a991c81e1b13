"""Answers and requests in JSON: the same again after the way there and back, to the last bit of every float."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_servers.contract import Captions, DetectedObject, Detection, Judgement, Measurement, Tags
from reward_servers.http_payloads import ANSWERS, encode
from reward_servers.http_routes import ROUTES
from tests.reward_servers.http_fakes import PICTURE

pytestmark = pytest.mark.unit

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=8)
TINY_MASKS = [None, np.array([[True]]), np.random.default_rng(2).random((3, 9)) > 0.5]
OBJECTS = st.builds(
    DetectedObject, TEXT, FINITE, st.tuples(FINITE, FINITE, FINITE, FINITE), FINITE, st.sampled_from(TINY_MASKS)
)
CONTRACT = {
    "objects": st.builds(Detection, st.lists(OBJECTS, max_size=3).map(tuple), st.lists(TEXT, max_size=2).map(tuple)),
    "judge": st.lists(st.builds(Judgement, FINITE, FINITE, FINITE, TEXT), max_size=3),
    "caption": st.builds(Captions, TEXT, TEXT, TEXT),
    "tag": st.builds(Tags, st.lists(TEXT, max_size=3).map(tuple)),
    "measure": st.builds(Measurement, st.dictionaries(TEXT, st.lists(FINITE, max_size=3).map(tuple), max_size=2)),
}


def sent(method, answer):
    """As the client gets it: through the text of an HTTP body."""
    return ANSWERS[method].model_validate_json(ANSWERS[method].of(answer).model_dump_json()).answer()


def bits(values) -> bytes:
    """-0.0 equals 0.0, but is not the same."""
    return np.asarray(values, np.float64).tobytes()


@pytest.mark.parametrize("method", CONTRACT)
def test_answers_survive(method):
    @settings(max_examples=20, deadline=None, database=None)
    @given(CONTRACT[method])
    def holds(answer):
        again = sent(method, answer)
        assert again == answer
        if method == "objects":
            for mine, theirs in zip(answer.objects, again.objects, strict=True):
                assert bits(mine.box) == bits(theirs.box)
                np.testing.assert_equal(theirs.mask, mine.mask)
        if method == "measure":
            assert all(bits(again.values[name]) == bits(values) for name, values in answer.values.items())

    holds()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("objects", lambda x: Detection((DetectedObject("cat", x, (0, 0, 1, 1), 0.5),), ())),
        ("objects", lambda x: Detection((DetectedObject("cat", 0.5, (0, 0, x, 1), 0.5),), ())),
        ("judge", lambda x: [Judgement(1.0, x, 1.0)]),
        ("measure", lambda x: Measurement({"PSNR": (1.0, x)})),
    ],
)
def test_what_is_no_finite_number_is_never_sent(method, answer, value):
    with pytest.raises(ValidationError, match="finite number"):
        ANSWERS[method].of(answer(value))


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("measure", b'{"values": {"PSNR": [NaN]}}'),
        ("measure", b'{"values": {"PSNR": [1e999]}}'),
        ("measure", b'{"values": {"PSNR": [null]}}'),
        ("judge", b'{"judgements": [{"quality": Infinity, "realism": 1, "consistency": 1}]}'),
        ("tag", b'{"names": ["cat"], "more": 1}'),
        ("caption", b'{"coarse": "a", "middle": "b"}'),
    ],
)
def test_a_client_takes_no_other_answer(method, body):
    with pytest.raises(ValidationError):
        ANSWERS[method].model_validate_json(body)


@pytest.mark.parametrize(
    ("server", "method", "arguments"),
    [
        ("grounded_sam", "objects", {"names": ["x" * 65]}),
        ("grounded_sam", "objects", {"names": [""]}),
        ("grounded_sam", "objects", {"names": ["x"] * 2049}),
        ("qwen_vl", "caption", {"url": "http://169.254.169.254/"}),
        ("iqa", "measure", {"images": []}),
    ],
)
def test_a_request_beyond_its_bounds_is_refused(server, method, arguments):
    image = {"images": [PICTURE]} if method == "measure" else {"image": PICTURE}
    with pytest.raises(ValidationError):
        ROUTES[server][method].model_validate(encode(image) | arguments)
