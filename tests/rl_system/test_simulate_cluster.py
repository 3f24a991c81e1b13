"""The arithmetic of 7B, its file, and the search for a split."""

from __future__ import annotations

import itertools
import math

import pytest
import yaml

from rl_system.commands.main import main
from rl_system.studies.scaling.hardware import SHIPPED, Allocation, Cluster, CostsRefused, read_figures
from rl_system.studies.scaling.search import best_batch, best_plan, bottleneck, evaluate

pytestmark = pytest.mark.unit

NAME, FIGURES = read_figures(SHIPPED)
CLUSTER = Cluster(FIGURES)


def test_costs_of_7b_are_those_of_pencil_and_paper():
    # 18 bytes x 7.08e9 over devices with 72 - 12 GB each
    assert CLUSTER.least_learner_gpus() == 3
    # room 72 - 14.2 - 3 GB; a group's keys and values at their longest 0.524 MB x (4,300 + 8 x 5,800) = 26.6 GB
    rollout = CLUSTER.rollout()
    assert rollout.concurrent == 2
    # weights 14.16 GB at 2.345 TB/s, 3 ms besides
    assert rollout.base_s == pytest.approx(0.00604 + 0.003, abs=1e-5)
    # eight times 0.524 MB x 7,200 at 2.345 TB/s, and a prefill of 56 TFLOP at 495 TFLOP/s every 5,800 tokens
    assert rollout.each_s == pytest.approx(8 * 0.0016097 + 0.1126 / 5800, rel=1e-3)
    # (2 x 6.476e9 + attention 4 x 4096 x 32 x 5,050) x 10,100 + head, five times, at 396 TFLOP/s
    assert CLUSTER.sequence_s(4) == pytest.approx(5 * 158.3e12 / 395.6e12, rel=1e-3)


def test_a_slow_network_holds_the_learner_up_only_across_nodes():
    slow = CLUSTER.changed(network__between_nodes=12.5e9)
    assert slow.sequence_s(8) == CLUSTER.sequence_s(8)
    assert slow.sequence_s(16) == pytest.approx(4 * (14.16e9 * 15 / 16 / 8.75e9 + 32 * 15 * 5e-6))


def test_a_learner_has_as_many_rounds_as_its_fullest_rank_has_sequences():
    def step(ranks: int, groups: int) -> float:
        return CLUSTER.learner(Allocation(ranks, 1, 1, 1), groups).fixed_s - 1.0

    assert step(3, 8) == pytest.approx(22 * CLUSTER.sequence_s(3))  # 64 sequences over 3
    assert step(64, 8) == pytest.approx(CLUSTER.sequence_s(64))
    assert step(128, 8) == pytest.approx(CLUSTER.sequence_s(128))  # half of the ranks have nothing to do


def test_factors_slow_one_kind_and_multiply():
    twice = CLUSTER.scaled(expert=2).scaled(expert=1.5, rollout=0.5)
    assert twice.expert().base_s == pytest.approx(3 * CLUSTER.expert().base_s)
    assert twice.rollout().each_s == pytest.approx(0.5 * CLUSTER.rollout().each_s)
    assert twice.detector() == CLUSTER.detector()


def test_the_search_finds_the_best_of_all_splits_of_eight():
    every = [
        Allocation(learner, rollout, detector, 8 - learner - rollout - detector)
        for learner, rollout, detector in itertools.product(range(3, 6), range(1, 4), range(1, 4))
        if 8 - learner - rollout - detector >= 1
    ]
    found = best_plan(CLUSTER, 8, 8, 1)
    assert found.rate == pytest.approx(max(evaluate(CLUSTER, a, 8, 1).rate for a in every), rel=0.01)
    assert found.allocation == Allocation(3, 3, 1, 1)
    paper = evaluate(CLUSTER, Allocation(4, 2, 1, 1), 8, 1)
    assert found.rate > 1.4 * paper.rate
    assert next(iter(bottleneck(CLUSTER, found))) == "rollout"


def test_gpus_follow_the_work():
    expert_heavy = CLUSTER.scaled(expert=100)
    plan = best_plan(expert_heavy, 24, best_batch(expert_heavy, 24, 1), 1)
    assert plan.allocation.gpus == 24
    assert plan.allocation.expert > best_plan(CLUSTER, 24, 32, 1).allocation.expert


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["policy"].pop("layers"), "policy must give parameters"),
        (lambda c: c["policy"].update(layer=[1, "x"]), "policy must give parameters"),
        (lambda c: c.update(more={"a": [1, "x"]}), "more must give nothing"),
        (lambda c: c["policy"].update(layers=32), "policy.layers must be"),
        (lambda c: c["policy"].update(layers=[32, " "]), "policy.layers must be"),
        (lambda c: c["policy"].update(layers=[-1, "guess"]), "policy.layers must be"),
        (lambda c: c["policy"].update(layers=[math.inf, "guess"]), "policy.layers must be"),
    ],
)
def test_a_file_without_a_source_for_each_number_is_refused(tmp_path, capsys, change, message):
    costs = yaml.safe_load(SHIPPED.read_text())
    change(costs)
    path = tmp_path / "costs.yaml"
    path.write_text(yaml.safe_dump(costs))
    assert main(["simulate", "cluster", "--costs", str(path), "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "5"], "6 are needed"),
        (["--split", "2/4/1/1"], "does not fit on fewer than 3"),
        (["--split", "4/2/1"], "not four numbers"),
        (["--split", "4/3/0/1"], "at least one GPU"),
        (["--time", "sam=2"], "there is no 'sam'"),
        (["--time", "expert=0"], "must be positive"),
        (["--time", "expert=x"], "not KIND=FACTOR"),
        (["--costs", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(capsys, arguments, message):
    assert main(["simulate", "cluster", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_too_large_for_a_device_is_refused():
    with pytest.raises(CostsRefused, match="do not fit beside the weights"):
        CLUSTER.changed(device__memory_bytes=40e9).rollout()


def test_the_table_of_a_given_split(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["cluster", "--split", "4/2/1/1", "--max-staleness", "1", "--groups-per-step", "8"]
    assert main(["simulate", *arguments]) == 0
    printed = capsys.readouterr().out
    plan = evaluate(CLUSTER, Allocation(4, 2, 1, 1), 8, 1)
    assert f"{plan.rate:.3f}" in printed and "rollout +" in printed and "estimates, not measurements" in printed


def test_several_splits_and_factors_in_one_call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--max-staleness", "0", "--groups-per-step", "8", "--time", "expert=2", "rollout=0.5"]
    assert main(["simulate", "cluster", "--split", "4/2/1/1", "3/3/1/1", *arguments]) == 0
    printed = capsys.readouterr().out
    for split in (Allocation(4, 2, 1, 1), Allocation(3, 3, 1, 1)):
        rate = evaluate(CLUSTER.scaled(expert=2, rollout=0.5), split, 8, 0).rate
        assert str(split) in printed and f"{rate:.3f}" in printed
