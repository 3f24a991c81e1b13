"""Plans of the experiments against numbers worked out by hand, and advice that is tried."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from rl_system.config.compose import compose_config
from rl_system.doctor.advice import HOST, misfits, remedies
from rl_system.doctor.machine import Machine, planned
from rl_system.doctor.plan import find_models, groups_at_once, make_plan, named

pytestmark = pytest.mark.unit
PARAMETERS = 7_080_775_680
PAPER = ["experiment=realsr_r1_7b"]
MEMORY = 80e9


@pytest.fixture(scope="module")
def config():
    return compose_config(PAPER)


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config, find_models(config))


def test_eight_gpus_as_the_paper_has_them(plan):
    counts = {p.kind: p.count for p in plan.processes if p.gpus}
    assert counts == {"learner rank": 4, "rollout engine": 2, "Grounded-SAM replica": 1, "expert engine": 1}
    assert plan.gpus == 8
    assert misfits(plan, planned("8x80", None)) == []


def test_the_papers_numbers(config):
    learner, rollout = config.learner, config.rollout
    assert (rollout.group_size, learner.groups_per_step) == (3, 8)
    assert learner.steps * learner.groups_per_step == 2 * config.data.train_rows == 2 * 500
    assert (learner.learning_rate, learner.schedule, rollout.temperature) == (2e-6, "cosine", 0.9)


def test_a_learner_rank_under_zero_3(plan):
    device = named(plan, "learner rank").device
    share = PARAMETERS / 4
    assert device["weights"] == device["reference"] == device["gradients"] == 2 * share
    assert device["optimizer"] == 12 * share  # 19.8 GiB
    assert device["gradient bucket"] == 1e9  # DeepSpeed's 5e8 values in bf16
    assert device["gathered"] == 2e9


def test_activations_of_a_whole_group_with_checkpointing(plan):
    """The budget, filled by prompts of 4,338 ids with 3 x 7,000: 32 layers keep their input, one keeps all."""
    tokens, groups = 25_600, 25_600 / (4_338 + 3 * 7_000)
    attended = tokens + groups * 3 * (4_338 + 7_000)
    inputs = 32 * tokens * 4096 * 2
    layer = tokens * (2 * 4096 * 6 + 2 * (3 * 4096 + 4 * 4096 + 2 * 4096 + 4 * 11_008)) + attended * 2 * 4096 * 2
    passing = tokens * 2 * (2 * 11_008 + 2 * 4096)
    assert named(plan, "learner rank").phases["backward"]["activations"] == pytest.approx(inputs + layer + passing)


def test_the_key_value_cache_holds_four_groups(plan):
    engine = named(plan, "rollout engine")
    assert plan.group_cache == 524_288 * (4_338 + 3 * 7_000)
    free = 0.9 * MEMORY - 2 * PARAMETERS - engine.device["activations"] - engine.device["CUDA, graphs"]
    assert engine.cache_at(MEMORY) == pytest.approx(free)
    assert groups_at_once(plan, MEMORY) == int(free // plan.group_cache) == 4


def test_a_checkpoint_is_what_a_run_has_written():
    """34 MB for 2,167,488 values with two ranks: 12 bytes a value beside the exported policy."""
    config = compose_config(["experiment=toy"])
    assert make_plan(config, find_models(config)).checkpoint == pytest.approx(2 * 13_009_983, rel=0.01)


def test_adapters_alone_have_gradients_an_optimizer_and_a_checkpoint(plan):
    """Rank 64 on all seven layers of 32: 160 million values."""
    config = compose_config([*PAPER, "learner.lora.rank=64"])
    lora = make_plan(config, find_models(config))
    device = named(lora, "learner rank").device
    values = 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    assert values == 159_907_840
    assert device["weights"] == 2 * (PARAMETERS + values) / 4
    assert (device["gradients"], device["optimizer"]) == (2 * values / 4, 12 * values / 4)
    assert device["reference"] == 0 and lora.checkpoint == 12 * values
    before, after = (sum(named(p, "learner rank").device.values()) for p in (plan, lora))
    assert before - after == pytest.approx(
        16 * (PARAMETERS - values) / 4
    )  # gradients, optimizer and reference: 16 of 18 bytes a value
    assert misfits(lora, planned("8x80", None)) == []


@pytest.mark.parametrize(
    ("gpu_gb", "overrides", "kind", "wanted"),
    [
        (40, [], "learner rank", "learner.ranks="),
        (48, [], "learner rank", "learner.offload_reference=true learner.micro_batch_tokens="),
        (80, ["learner.activation_checkpointing=false"], "learner rank", "learner.activation_checkpointing=true"),
        (80, ["learner.ranks=2"], "learner rank", "learner.ranks=3"),
        (32, [], "rollout engine", "rollout.group_size=2"),
        (16, [], "expert engine", "reward.qwen_vl.tensor_parallel_size=2 reward.qwen_vl.num_gpus=2"),
    ],
)
def test_the_settings_that_are_named_make_it_fit(gpu_gb, overrides, kind, wanted):
    machine = planned(f"64x{gpu_gb}", None)
    config = compose_config([*PAPER, *overrides])
    sizes = find_models(config)
    assert kind in misfits(make_plan(config, sizes), machine)
    found = remedies(config, sizes, machine, kind)
    assert any(wanted in text for text in found), found
    for text in found:
        changed = compose_config([*PAPER, *overrides, *shlex.split(text)])
        assert kind not in misfits(make_plan(changed, find_models(changed)), machine), text


def test_host_memory_of_a_machine_without_gpus():
    config = compose_config(["experiment=toy", "rollout.kv_cache_gib=8"])
    sizes = find_models(config)
    plan = make_plan(config, sizes)
    machine = Machine(0, None, plan.host_total - 2**30, None, here=True)
    assert misfits(plan, machine) == [HOST]
    assert "rollout.kv_cache_gib=6.0" in remedies(config, sizes, machine, HOST)
    assert misfits(plan, replace(machine, memory=plan.host_total)) == []


def test_other_servers_count_with_their_gpus():
    config = compose_config([*PAPER, "reward=perceptual", "reward.iqa.num_gpus=1", "reward.iqa.replicas=2"])
    plan = make_plan(config, find_models(config))
    assert (plan.gpus, plan.unplanned) == (9, ("iqa",))
    assert {p.kind for p in plan.processes} >= {"Grounded-SAM replica", "iqa replica"}


def test_an_engine_on_two_gpus_holds_half_on_each():
    one, two = (
        make_plan(config, find_models(config))
        for config in (
            compose_config(PAPER),
            compose_config([*PAPER, "rollout.tensor_parallel_size=2", "rollout.num_gpus=2"]),
        )
    )
    assert two.gpus == one.gpus + 2
    assert named(two, "rollout engine").device["weights"] == PARAMETERS
    assert groups_at_once(two, MEMORY) > 2 * groups_at_once(one, MEMORY)


def test_no_more_gpus_than_there_are_are_advised():
    config = compose_config([*PAPER, "learner.ranks=2", "learner.activation_checkpointing=false"])
    sizes = find_models(config)
    found = remedies(config, sizes, planned("6x60", None), "learner rank")
    assert not any("learner.ranks" in text for text in found), found
