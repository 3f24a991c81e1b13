"""What the scorer asks of whom, and what it makes of the answers."""

from __future__ import annotations

import ast
import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reward_servers.contract import Detection, Judgement, Measurement, Tags
from rl_system import assembly
from rl_system.config.compose import compose_config
from tests.rl_system.runs.synthetic import scored_group
from vlcot.groups import Absent, Failed, Group, Scored, ScoredGroup
from vlcot.rewards import metrics_reward

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DEGRADATION = (
    "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
    "no blur, upscale, medium poisson noise, light compression]"
)
PSNR, SSIM = (20.0, 25.0, 30.0), (0.5, 0.6, 0.7)


class Client:
    """Answers as it was told and writes down what it was asked: the client's own ways are tested with it."""

    def __init__(self, measured: Measurement | Failed | None = None) -> None:
        self.asked: list[str] = []
        self.measured = Measurement({"PSNR": PSNR, "SSIM": SSIM}) if measured is None else measured
        self.reference: np.ndarray | None = None
        self.names: tuple[str, ...] | None = None
        self.tagged: Tags | Failed = Tags(("dog", "cat", "hat", "sky"))

    def left_alone(self):
        return ()

    async def objects(self, image, names):
        self.asked.append("objects")
        self.names = names
        return Detection((), ("cat",))

    async def tag(self, image):
        self.asked.append("tag")
        return self.tagged

    async def judge(self, lr, images, seed):
        self.asked.append("judge")
        return [Judgement(8.0, 6.0, 4.0, "sharp")] * len(images)

    async def measure(self, images, reference):
        self.asked.append("measure")
        self.reference = reference
        return self.measured


@pytest.fixture(scope="module")
def group() -> Group:
    """Four samples, the second without a final image."""
    group = scored_group(0, 1.0).group
    truth = np.full((64, 64, 3), 7, np.uint8)
    return replace(group, prompt=replace(group.prompt, truth=truth, degradation=DEGRADATION))


def scored(client: Client, group: Group, *overrides: str) -> ScoredGroup:
    async def score() -> ScoredGroup:
        scorer = assembly.scorer(compose_config(["experiment=toy", *overrides]), client)
        return await scorer.score(group, scorer.find_objects(group.prompt))

    return asyncio.run(score())


def test_the_visual_expert_judges_unless_told_otherwise(group):
    client = Client()
    result = scored(client, group)
    assert client.asked == ["objects", "judge"] and set(result.reward_s) == {"grounded_sam", "qwen_vl"}
    generation = [scores["generation"] for scores in result.scores]
    assert generation[0].value == pytest.approx(0.4 * 0.8 + 0.3 * 0.6 + 0.3 * 0.4)
    assert generation[1] == Scored(0.0, {"reason": "no final image"})


def test_the_perceptual_expert_compares_with_the_ground_truth(group):
    client = Client()
    result = scored(client, group, "reward=perceptual_offline")
    assert client.asked == ["objects", "measure"] and set(result.reward_s) == {"grounded_sam", "iqa"}
    np.testing.assert_array_equal(client.reference, group.prompt.truth)
    first, second, third = (metrics_reward({"PSNR": p, "SSIM": s}) for p, s in zip(PSNR, SSIM, strict=True))
    nothing = Scored(0.0, {"reason": "no final image"})
    assert [scores["generation"] for scores in result.scores] == [first, nothing, second, third]
    assert result.valid.all()


def test_the_generative_expert_never_gets_the_ground_truth(group):
    names = ("MUSIQ", "MANIQA", "CLIPIQA", "TOPIQ")
    client = Client(Measurement(dict.fromkeys(names, (0.5,) * 3)))
    assert scored(client, group, "reward=generative").valid.all()
    assert client.reference is None


def test_the_detector_looks_for_its_own_vocabulary_or_for_what_the_tagger_sees(group):
    own, tagged = Client(), Client()
    assert scored(own, group).objects == ("cat",) and own.names is None
    assert scored(tagged, group, "reward=objects_tagged").objects == ("cat",)
    assert tagged.names == ("dog", "cat", "hat", "sky") and tagged.asked == ["tag", "objects", "judge"]


def test_the_tagger_alone_gives_its_most_important_names(group):
    client = Client()
    result = scored(client, group, "reward=objects_qwen_vl")
    assert result.objects == ("dog", "cat", "hat") and client.asked == ["tag", "judge"]
    assert set(result.reward_s) == {"qwen_vl"}


@pytest.mark.parametrize("choice", ["objects_tagged", "objects_qwen_vl"])
def test_without_tags_there_is_no_understanding_reward(group, choice):
    client = Client()
    client.tagged = Failed("qwen_vl failed 4 times")
    result = scored(client, group, f"reward={choice}")
    assert not result.valid.any() and result.scores[0]["understanding"] == client.tagged
    assert "objects" not in client.asked


def test_names_that_the_data_give_need_no_server(group):
    given = replace(group, prompt=replace(group.prompt, objects=("cup", "spoon")))
    client = Client()
    result = scored(client, given, "reward=objects_file")
    assert result.objects == ("cup", "spoon") and client.asked == ["judge"]
    assert set(result.reward_s) == {"qwen_vl"}
    with pytest.raises(ValueError, match="data that name their objects"):
        scored(client, group, "reward=objects_file")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Failed("iqa failed 4 times"), "iqa failed 4 times"),
        (Measurement({"PSNR": PSNR}), "iqa measured PSNR, this run's reward is of PSNR, SSIM"),
    ],
)
def test_a_measurement_that_failed_or_is_of_other_metrics_is_no_reward(group, answer, reason):
    """A failure never becomes a number, and a server for another configuration never another reward."""
    result = scored(Client(answer), group, "reward=perceptual_offline")
    assert result.valid.tolist() == [False, True, False, False]
    assert result.scores[0]["generation"] == Failed(reason)


def test_a_reward_that_is_switched_off_asks_no_server_and_is_absent(group):
    client = Client()
    result = scored(client, group, "reward=no_generation", "reward.weights.understanding=0")
    assert client.asked == [] and result.reward_s == {} and result.objects == ()
    for scores in result.scores:
        assert isinstance(scores["understanding"], Absent) and isinstance(scores["generation"], Absent)
        assert isinstance(scores["format"], Scored)
    assert result.valid.all()


def test_only_the_scorer_and_the_digest_of_stored_groups_read_the_ground_truth():
    """The policy would be given the answer (``Prompt.truth``)."""
    packages = ("vlcot", "actors", "reward_servers", "learners", "rl_system", "toy")
    readers = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "truth"
    }
    assert readers == {"rl_system/coordination/experts.py", "rl_system/runs/group_file.py"}
