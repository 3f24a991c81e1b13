"""The Serve configuration of reward servers, and what a change to a deployed one changes."""

from __future__ import annotations

import copy

import pytest
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from rl_system.config.compose import CONFIG_DIR, load_config
from rl_system.serve_config import ServeCluster, serve_config

pytestmark = pytest.mark.unit

OVERRIDES = ["experiment=toy", "reward.grounded_sam.vocabulary=[cat, coin]", "reward.qwen_vl.repeats=4"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)


@pytest.fixture(scope="module")
def config():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CONFIG_DIR.parent)
        return serve_config(load_config(OVERRIDES), OVERRIDES, "127.0.0.1", 8100)


class Client:
    """The dashboard: answers what was put, as Ray's does."""

    def __init__(self, config):
        self.config = copy.deepcopy(config)
        self.puts = []

    def get_serve_details(self):
        apps = {app["name"]: {"deployed_app_config": app} for app in self.config["applications"]}
        apps |= {"of a running job": {"deployed_app_config": None}}
        return {"proxy_location": "EveryNode", "http_options": self.config["http_options"], "applications": apps}

    def deploy_applications(self, config):
        self.puts.append(config)


@pytest.fixture
def cluster(config):
    made = ServeCluster.__new__(ServeCluster)
    made._client = Client(config)
    return made


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def changes(cluster, config):
    """(application, key, value) of everything in the last put that is not as it was deployed."""
    (put,) = cluster._client.puts
    assert without(put, "applications") == without(config, "applications")
    found = []
    for was, now in zip(config["applications"], put["applications"], strict=True):
        assert without(was, "deployments") == without(now, "deployments")
        (before,), (after,) = was["deployments"], now["deployments"]
        found += [(now["name"], key, after[key]) for key in after if before.get(key) != after[key]]
    return found


def test_serve_knows_every_field_of_the_configuration(config):
    ServeDeploySchema.model_validate(config)
    for app in config["applications"]:
        assert set(app) <= set(ServeApplicationSchema.model_fields)
        assert set(app["deployments"][0]) <= set(DeploymentSchema.model_fields)
    assert [app["route_prefix"] for app in config["applications"]] == ["/grounded_sam", "/qwen_vl"]
    environment = config["applications"][1]["deployments"][0]["ray_actor_options"]["runtime_env"]["env_vars"]
    assert "VLLM_CPU_OMP_THREADS_BIND" in environment


def test_servers_are_those_of_the_configuration():
    overrides = ["experiment=toy", "reward=perceptual_offline", "reward.weights.understanding=0"]
    config = serve_config(load_config(overrides), overrides, "0.0.0.0", 8000)
    assert [app["name"] for app in config["applications"]] == ["iqa"]
    with pytest.raises(ValueError, match="asks no reward server"):
        none = ["experiment=toy", "reward.weights.understanding=0", "reward.weights.generation=0"]
        serve_config(load_config(none), none, "127.0.0.1", 8000)


def test_scaling_changes_the_range_of_one_application_and_nothing_else(cluster, config):
    cluster.scale("grounded_sam", 2, 5)
    ((name, key, value),) = changes(cluster, config)
    assert (name, key) == ("grounded_sam", "autoscaling_config")
    assert value == {"min_replicas": 2, "max_replicas": 5}


def test_live_settings_change_alone_and_add_up(cluster, config):
    cluster.set_live("grounded_sam", {"box_threshold": 0.4})
    assert changes(cluster, config) == [("grounded_sam", "user_config", {"box_threshold": 0.4})]
    for settings in ({"vocabulary": ["cat"]}, {"main": {"min_score": 0.4}}, {"main": {"max_count": 2}}):
        cluster._client.config = cluster._client.puts.pop()
        cluster.set_live("grounded_sam", settings)
    (put,) = cluster._client.puts
    assert put["applications"][0]["deployments"][0]["user_config"] == {
        "box_threshold": 0.4,
        "vocabulary": ["cat"],
        "main": {"min_score": 0.4, "max_count": 2},
    }


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda c: c.scale("sam", 1, 1), "no application sam; there are: grounded_sam, qwen_vl"),
        (lambda c: c.scale("grounded_sam", 0, 1), "must be 1 <= LEAST <= MOST, got 0 and 1"),
        (lambda c: c.scale("grounded_sam", 3, 2), "got 3 and 2"),
        (lambda c: c.set_live("grounded_sam", {"box_threshold": 7}), "box_threshold must lie in"),
        (lambda c: c.set_live("grounded_sam", {"detector": "x"}), "no live setting"),
        (lambda c: c.set_live("grounded_sam", {"vocabulary": []}), "vocabulary"),
        (lambda c: c.set_live("grounded_sam", {"vocabulary": ["unicorn"]}), "does not know unicorn"),
        (lambda c: c.set_live("qwen_vl", {"repeats": 0}), "repeats"),
        (lambda c: c.set_live("nothing", {"repeats": 1}), "no application nothing"),
    ],
)
def test_a_bad_change_is_refused_before_anything_is_put(cluster, do, said):
    with pytest.raises(ValueError, match=said):
        do(cluster)
    assert cluster._client.puts == []


def test_other_applications_are_kept(cluster, config):
    cluster.deploy({**config, "applications": config["applications"][1:]})
    cluster.delete(["qwen_vl"])
    deployed, left = cluster._client.puts
    assert [app["name"] for app in deployed["applications"]] == ["grounded_sam", "qwen_vl"]
    assert [app["name"] for app in left["applications"]] == ["grounded_sam"]


def test_nobody_there_is_said_with_the_address():
    with pytest.raises(ConnectionError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        ServeCluster("http://127.0.0.1:9")
