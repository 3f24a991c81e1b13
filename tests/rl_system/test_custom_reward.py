"""A reward of the user's own, from docs/reward-servers.md: configured, served, asked, weighted, trained on."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import numpy as np
import pytest

from reward_servers.contract import Detection, Judgement
from rl_system import assembly
from rl_system.config.compose import CONFIG_DIR, ConfigError, compose_config, load_config
from rl_system.config.servers import servers
from rl_system.coordination.meter import reward_means
from tests.rl_system.runs.synthetic import scored_group
from vlcot.groups import Failed, Group, Scored

EXAMPLE = CONFIG_DIR.parent / "docs" / "examples" / "colour_reward.py"
COLOUR = '+reward.extra.colour={target: "colour_reward:ColourReward", weight: 0.5, options: {tolerance: 64}}'
OFF = ["reward.weights.understanding=0", "reward.weights.generation=0"]


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)
    monkeypatch.syspath_prepend(EXAMPLE.parent)


@pytest.fixture
def group() -> Group:
    """Four samples, the second without a final image."""
    group = scored_group(0, 1.0).group
    truth = (
        "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
        "no blur, upscale, medium poisson noise, light compression]"
    )
    return replace(group, prompt=replace(group.prompt, degradation=truth))


class Client:
    """The four rewards' servers, and the user's, which answers as told."""

    def __init__(self, answer):
        self.answer = answer

    def left_alone(self):
        return ()

    async def objects(self, image, names):
        return Detection((), ())

    async def judge(self, lr, images, seed):
        return [Judgement(5.0, 5.0, 5.0)] * len(images)

    async def score(self, server, lr, images):
        assert server == "colour" and len(images) == 3
        return self.answer


def scored(group, answer, *overrides):
    config = compose_config(["experiment=toy", COLOUR, *overrides])

    async def score():
        scorer = assembly.scorer(config, Client(answer))
        return await scorer.score(group, scorer.find_objects(group.prompt))

    return asyncio.run(score())


@pytest.mark.unit
def test_the_worked_example_is_short_and_prefers_the_right_colours(importable):
    assert len(EXAMPLE.read_text().splitlines()) < 60
    from colour_reward import ColourReward

    lr = np.zeros((16, 16, 3), np.uint8)
    lr[:8] = (200, 40, 40)
    right = lr.repeat(4, axis=0).repeat(4, axis=1)
    same, bluish, upside_down = ColourReward(tolerance=64).score(lr, [right, right + np.uint8(16), right[::-1]])
    assert same == 1.0 and bluish == pytest.approx(0.75) and upside_down == 0.0


@pytest.mark.unit
def test_it_counts_with_its_weight_and_shows_under_its_name(importable, group):
    with_it, without = scored(group, [1.0, 0.5, 0.0]), scored(group, [0.0, 0.0, 0.0])
    assert [s["colour"] for s in with_it.scores] == [
        Scored(1.0),
        Scored(0.0, {"reason": "no final image"}),
        Scored(0.5),
        Scored(0.0),
    ]
    np.testing.assert_allclose(with_it.totals - without.totals, [0.5, 0.0, 0.25, 0.0])
    assert reward_means([with_it])["reward/colour"] == pytest.approx(1.5 / 4)


@pytest.mark.unit
def test_its_failure_is_no_number(importable, group):
    failed = scored(group, Failed("colour failed 4 times"))
    assert failed.valid.tolist() == [False, True, False, False]


@pytest.mark.unit
def test_its_server_is_started_only_while_it_has_a_weight(importable):
    config = compose_config(["experiment=toy", COLOUR])
    assert servers(config) == ("grounded_sam", "qwen_vl", "colour")
    assert "reward.extra.colour.replicas" in [demand.setting for demand in assembly.demands(config)]
    assert "colour" not in servers(compose_config(["experiment=toy", COLOUR, "reward.extra.colour.weight=0"]))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('+reward.extra.colour={target: "colour_reward:Nothing"}', "reward.extra.colour.target: "),
        ('+reward.extra.colour={target: "no_such_module:X"}', "no_such_module"),
        ('+reward.extra.colour={target: "collections:OrderedDict"}', "has no method score(lr, images)"),
        ('+reward.extra.format={target: "colour_reward:ColourReward"}', "reward.extra.format: a name has"),
        ('+reward.extra.colour={target: "colour_reward:ColourReward", weight: -1}', "must not be negative"),
        ('+reward.extra.colour={target: "colour_reward:ColourReward", replicas: 0}', "is too small"),
        ('+reward.extra.colour={goal: "colour_reward:ColourReward"}', "goal"),
    ],
)
def test_a_wrong_one_is_refused_with_one_clear_message(importable, override, said):
    with pytest.raises(ConfigError) as error:
        load_config(["experiment=toy", override])
    assert said in str(error.value)


@pytest.mark.engine
@pytest.mark.timeout(200)
def test_it_is_served_by_serve_and_answers_as_a_direct_call(importable):
    import ray
    from colour_reward import ColourReward
    from ray import serve

    from reward_servers.deploy import deploy
    from reward_servers.transports import HandleTransport
    from rl_system import reward_apps

    config = load_config(["experiment=toy", COLOUR, *OFF])
    lr = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    images = [np.roll(lr.repeat(4, axis=0).repeat(4, axis=1), 8 * i, axis=0) for i in range(3)]
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        handles = deploy(reward_apps.applications(config))
        assert set(handles) == {"colour"}
        client = assembly.reward_client(config, HandleTransport(handles))
        served = asyncio.run(client.score("colour", lr, images))
        unfit = asyncio.run(client.score("colour", lr, [images[0][..., 0]]))
    finally:
        serve.shutdown()
        ray.shutdown()
    assert served == ColourReward(tolerance=64).score(lr, images)
    assert isinstance(unfit, Failed)
