"""Prompts, labels, NMS and the main rule of Grounded-SAM, without any model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import reward_servers
from reward_servers.contract import DetectedObject
from reward_servers.detection import (
    MainRule,
    box_iou,
    chunk_vocabulary,
    load_vocabulary,
    main_objects,
    nms,
    phrase_spans,
    prompt_text,
    whole_phrase,
)

pytestmark = pytest.mark.unit


def test_vocabulary_is_cleaned_and_may_come_from_a_file(tmp_path):
    names = ("cat", "traffic light")
    assert load_vocabulary([" Cat", "traffic  Light", "cat", ""]) == names
    (tmp_path / "names.txt").write_text("cat\n\nTraffic light\n", encoding="utf-8")
    assert load_vocabulary(str(tmp_path / "names.txt")) == names


def test_common_names_the_shipped_list_of_everyday_objects():
    names = load_vocabulary("common")
    assert len(names) >= 300 and {"dog", "car", "tree", "traffic light"} <= set(names)
    text = (Path(reward_servers.__file__).parent / "vocabularies/common_objects.txt").read_text(encoding="utf-8")
    assert list(names) == text.splitlines(), "clean as it is, every name once"
    assert all(re.fullmatch("[a-z][a-z ]*", name) for name in names)


@pytest.mark.parametrize(
    "source, words",
    [([], "no name"), (["a. b"], "'a. b'"), (["what?"], "what"), ("/none", "/none"), (7, "list of names")],
)
def test_a_bad_vocabulary_is_refused(source, words):
    with pytest.raises(ValueError, match=words):
        load_vocabulary(source)


def test_chunks_keep_every_name_once_in_order_and_fit():
    rng = np.random.default_rng(0)
    lengths = {f"name{i}": int(n) for i, n in enumerate(rng.integers(1, 6, size=200))}
    chunks = chunk_vocabulary(list(lengths), lengths.__getitem__, 32)
    assert [name for chunk in chunks for name in chunk] == list(lengths)
    sizes = [2 + sum(lengths[n] + 1 for n in chunk) for chunk in chunks]
    assert max(sizes) <= 32
    # Greedy: the next name would not have fitted.
    assert all(size + lengths[after[0]] + 1 > 32 for size, after in zip(sizes, chunks[1:], strict=False))


def test_a_vocabulary_that_fits_is_one_chunk_and_one_token_more_splits_it():
    names = ["a", "b", "c"]
    assert chunk_vocabulary(names, lambda _: 1, 8) == [("a", "b", "c")]
    assert chunk_vocabulary(names, lambda _: 1, 7) == [("a", "b"), ("c",)]


def test_a_name_longer_than_a_prompt_is_refused():
    with pytest.raises(ValueError, match=r"'long' takes 8 tokens"):
        chunk_vocabulary(["a", "long"], {"a": 1, "long": 5}.__getitem__, 7)


def test_spans_hold_the_tokens_of_each_name():
    ids = [101, 7, 8, 1012, 9, 1012, 10, 11, 12, 1012, 102]
    assert phrase_spans(ids, 1012) == [(1, 3), (4, 5), (6, 9)]
    assert prompt_text(["a b", "c"]) == "a b. c."


# Prompt: [CLS] traffic light . light . cat . [SEP]
SPANS = [(1, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ({1: 0.5, 2: 0.6, 4: 0.45}, (0, 0.6)),  # the whole longer name
        ({1: 0.05, 2: 0.5, 4: 0.55}, (1, 0.55)),  # a part of the longer name does not beat the shorter one
        ({2: 0.6}, (0, 0.6)),  # a partial phrase stands for its name
        ({4: 0.3, 6: 0.7}, (2, 0.7)),  # a phrase over two names goes to the better one
        ({3: 0.9, 0: 0.8}, None),  # only punctuation: an empty phrase
        ({6: 0.22}, None),  # named, but below the box threshold
        ({}, None),
    ],
)
def test_phrases_are_mapped_to_whole_names(tokens, expected):
    probabilities = torch.zeros(9)
    for position, p in tokens.items():
        probabilities[position] = p
    found = whole_phrase(probabilities, SPANS, box_threshold=0.25, text_threshold=0.2)
    assert found == (None if expected is None else (expected[0], pytest.approx(expected[1])))


def oracle_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def oracle_nms(boxes, scores, threshold):
    left, kept = sorted(range(len(boxes)), key=lambda i: (-scores[i], i)), []
    while left:
        best, *rest = left
        kept.append(best)
        left = [i for i in rest if oracle_iou(boxes[best], boxes[i]) <= threshold]
    return kept


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_nms_agrees_with_a_plain_oracle(seed, threshold):
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 40, (30, 2)), rng.uniform(0, 30, (30, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    boxes[5] = boxes[4]  # a double
    boxes[6, 2:] = boxes[6, :2]  # an empty box
    scores = rng.integers(0, 8, 30) / 8  # with ties
    assert nms(torch.tensor(boxes), torch.tensor(scores), threshold) == oracle_nms(boxes, scores, threshold)


def test_iou_has_known_values():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 5]])
    assert box_iou(boxes)[0].tolist() == pytest.approx([1.0, 1 / 7, 0.0])
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5) == []


def thing(name, score, area):
    return DetectedObject(name, score, (0.0, 0.0, 1.0, 1.0), area)


def test_main_objects_are_large_certain_distinct_and_few():
    objects = [
        thing("cup", 0.9, 0.2),
        thing("coin", 0.8, 0.05),
        thing("coin", 0.5, 0.06),
        thing("cat", 0.35, 0.5),
        thing("face", 0.2, 0.6),
        thing("spoon", 0.9, 0.01),
    ]
    rule = MainRule(min_area=0.04, min_score=0.3, max_count=2)
    assert main_objects(objects, rule) == ("cat", "cup")
    assert main_objects(objects, MainRule(0.04, 0.3, 5)) == ("cat", "cup", "coin")
    assert main_objects([], rule) == ()


@pytest.mark.parametrize("field, value", [("min_area", 1.5), ("min_score", float("nan")), ("max_count", 0)])
def test_an_impossible_main_rule_is_refused(field, value):
    with pytest.raises(ValueError, match=f"grounded_sam.main.{field}"):
        MainRule(**{field: value})
