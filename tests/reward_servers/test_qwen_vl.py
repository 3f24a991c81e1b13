"""The visual expert behind a real vLLM engine, started once, with the shipped toy weights.

They were trained to judge. What they say as captioner and tagger means nothing: here their answers only have to have
the right form.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from reward_servers.caption_chat import CaptionPrompt
from reward_servers.contract import Judgement, RewardServerError
from reward_servers.expert_chat import MAX_RATIONALE, shown_orders
from reward_servers.qwen_vl import VisualExpert, VisualExpertConfig
from reward_servers.tag_chat import TagPrompt
from toy.expert_quality import expert_figures, graded_groups, judge, mixed_groups, weighted
from toy.judged_images import JudgedGroup
from toy.qwen_vl_checkpoint import WEIGHTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


class Server:
    """The expert, the one event loop that its engine lives on, and the processes it started."""

    def __init__(self) -> None:
        before = set(psutil.Process().children(recursive=True))
        started = time.monotonic()
        config = VisualExpertConfig(
            model=str(WEIGHTS),
            max_model_len=1024,
            kv_cache_gib=0.25,
            dtype="float32",
            # The toy's tokenizer spells letter by letter, and its context is short.
            caption_prompt=CaptionPrompt("Objects?", "Parts?", "Textures?", 24, 24, 24),
            tag_prompt=TagPrompt("Name {count} objects.", max_names=4),
        )
        self.expert = VisualExpert(config)
        self.start_s = time.monotonic() - started
        self.processes = set(psutil.Process().children(recursive=True)) - before
        self._runner = asyncio.Runner()

    def judge_all(self, groups: list[JudgedGroup], at_once: int = 8, seed: int = 0) -> list[list[Judgement]]:
        """Judgements of all groups, `at_once` requests open at a time."""

        async def run() -> list[list[Judgement]]:
            slots = asyncio.Semaphore(at_once)

            async def one(group: JudgedGroup) -> list[Judgement]:
                async with slots:
                    return await self.expert.judge(group.lr, list(group.images), seed)

            return await asyncio.gather(*map(one, groups))

        return self._runner.run(run())

    def run(self, coroutine):
        return self._runner.run(coroutine)

    def close(self) -> None:
        self.expert.shutdown()
        self._runner.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_ready_tells_the_versions_imported(server: Server) -> None:
    import vllm

    versions = server.run(server.expert.ready())
    print(f"engine start {server.start_s:.1f} s, {versions}")
    assert versions["vllm"] == vllm.__version__
    assert versions["torch"] == torch.__version__ and versions["max_images"] >= 2


def test_scores_follow_the_truth_on_held_out_crops(server: Server) -> None:
    graded, mixed = graded_groups(32), mixed_groups(32)
    answers = server.judge_all(graded + mixed)
    scores = [weighted(answer) for answer in answers]
    figures = expert_figures(graded, scores[:32], mixed, scores[32:])
    print(asdict(figures))
    assert figures.severity <= -0.7
    assert figures.psnr >= 0.6
    assert figures.weak_psnr_within >= 0.4
    assert max(figures.flat, figures.static) < figures.truth / 2


def test_server_answers_as_transformers_does(server: Server) -> None:
    """Same weights, same pixels, greedy: vLLM and transformers agree, so no image was changed on its way."""
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    for group in graded_groups(4):
        (order,) = shown_orders(len(group.images), 1, seed=5)
        shown = JudgedGroup(**{**vars(group), "images": group.images[order]})
        expected = dict(zip(order, judge(model, processor, shown), strict=True))
        (answer,) = server.judge_all([group], seed=5)
        assert answer == [expected[index] for index in range(len(order))]


@pytest.mark.parametrize("size", [4, 8])
def test_groups_judged_at_once_get_the_scores_they_get_alone(server: Server, size: int) -> None:
    groups = [JudgedGroup(**{**vars(group), "images": group.images[:size]}) for group in graded_groups(16)]
    server.judge_all(groups[:2])
    seconds = {}
    answers = {}
    for at_once in (1, 8):
        started = time.monotonic()
        answers[at_once] = server.judge_all(groups, at_once)
        seconds[at_once] = (time.monotonic() - started) / len(groups)
    print(f"groups of {size}: {1000 * seconds[1]:.0f} ms each alone, {1000 * seconds[8]:.0f} ms each of 8 at once")
    assert answers[8] == answers[1]


@pytest.fixture
def restored(server: Server) -> Iterator[None]:
    """The settings of the start, after a test that changes them."""
    yield
    server.expert.reconfigure({})


@pytest.mark.usefixtures("restored")
def test_repeats_change_live_and_average_the_rounds(server: Server) -> None:
    (group,) = graded_groups(1)
    (once,) = server.judge_all([group])
    server.expert.reconfigure({"repeats": 8})
    ((first, *_),) = server.judge_all([group])
    assert first.quality != round(first.quality) or first.realism != round(first.realism)
    server.expert.reconfigure({})
    assert server.judge_all([group]) == [once]


@pytest.mark.usefixtures("restored")
def test_a_rationale_is_forced_into_the_schema_and_cut_at_its_length(server: Server) -> None:
    (group,) = graded_groups(1)
    group = JudgedGroup(**{**vars(group), "images": group.images[:2]})
    server.expert.reconfigure({"rationale": True, "prompt": {"rationale": "Why?"}})
    (answer,) = server.judge_all([group])
    print(answer)
    assert all(0 < len(judged.rationale) <= MAX_RATIONALE for judged in answer)
    server.expert.reconfigure({})
    (answer,) = server.judge_all([group])
    assert not any(judged.rationale for judged in answer)


def test_a_caption_is_a_dialogue_of_three_rounds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = graded_groups(1)
    asked = noted(server, monkeypatch)
    captions = server.run(server.expert.caption(group.images[0]))
    print(captions)
    first, second, third = (text for text, *_ in asked)
    assert first.count("<|image_pad|>") == 1 and first.endswith("Objects?<|im_end|>\n<|im_start|>assistant\n")
    history = f"{first}{captions.coarse}<|im_end|>\n"
    assert second.startswith(history) and second.endswith("Parts?<|im_end|>\n<|im_start|>assistant\n")
    assert third.startswith(f"{second}{captions.middle}<|im_end|>\n") and "Textures?" in third
    assert [[picture.width for picture in shown] for _, shown, _ in asked] == [[16], [16, 32], [16, 32, 64]]
    assert captions.fine and server.run(server.expert.caption(group.images[0])) == captions


def test_tags_follow_the_schema(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = graded_groups(1)
    tags = server.run(server.expert.tag(group.images[0]))
    print(tags)
    assert 1 <= len(tags.names) <= 4
    assert all(re.fullmatch("[a-z][a-z -]*", name) and len(name) <= 40 for name in tags.names)
    asked = noted(server, monkeypatch, max_tokens=5)
    with pytest.raises(RewardServerError, match=r"no usable answer in 3 attempts.*tagger's answer is not JSON"):
        server.run(server.expert.tag(group.images[0]))
    assert len(asked) == 3


def noted(server: Server, monkeypatch: pytest.MonkeyPatch, **limits: int) -> list[tuple]:
    """What the engine is asked from here on; `limits` replace the limits of its answers."""
    asked: list[tuple] = []
    answer = server.expert._engine.answer

    async def note(text, images, decoding):
        asked.append((text, list(images), decoding))
        return await answer(text, images, replace(decoding, **limits))

    monkeypatch.setattr(server.expert._engine, "answer", note)
    return asked


def test_a_truncated_answer_is_asked_again_and_then_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfalls Part 2, 11: no answer, no number."""
    (group,) = graded_groups(1)
    noting = noted(server, monkeypatch, max_tokens=5)
    with pytest.raises(RewardServerError, match=r"no usable answer in 3 attempts.*not JSON"):
        server.judge_all([group])
    asked = [[picture.tobytes() for picture in shown] for _, shown, _ in noting]
    assert len(asked) == 3
    assert asked[0][0] == asked[1][0], "the reference stays first"
    assert asked[0] != asked[1], "a retry shows another order"


@pytest.mark.parametrize(
    ("lr", "images", "why"),
    [
        (np.zeros((16, 16, 3), np.uint8), [], "1 to 8 images, got 0"),
        (np.zeros((16, 16, 3), np.uint8), [np.zeros((64, 64, 3), np.uint8)] * 9, "1 to 8 images, got 9"),
        (np.zeros((16, 16, 3), np.float32), [np.zeros((64, 64, 3), np.uint8)], "lr must be uint8"),
        (np.zeros((16, 16, 3), np.uint8), [np.zeros((64, 64), np.uint8)], r"images\[0\] must be uint8"),
        (
            np.zeros((16, 16, 3), np.uint8),
            [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)],
            "must have one size",
        ),
    ],
)
def test_bad_input_is_refused_by_name(server: Server, lr: np.ndarray, images: list[np.ndarray], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        server.run(server.expert.judge(lr, images, 0))


def test_zz_a_dead_engine_is_an_error(server: Server) -> None:
    """Last: it kills the engine that the other tests share."""
    (group,) = graded_groups(1)
    server.run(server.expert.check_health())
    for process in server.processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # the worker ends with its engine
            process.kill()
    psutil.wait_procs(server.processes, timeout=10)
    with pytest.raises(RewardServerError):
        server.judge_all([group])
    with pytest.raises(RewardServerError, match="died"):
        server.run(server.expert.check_health())
