"""The documented metrics, the dashboard and the alerts belong together."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

from rl_system.config.compose import CONFIG_DIR
from rl_system.coordination.meter import PipelineMeter
from rl_system.runs.metric_names import COLD_START, GRPO, LIVE, prometheus_name, table
from tests.rl_system.runs.synthetic import scored_group

pytestmark = pytest.mark.unit

ROOT = CONFIG_DIR.parent
PROMETHEUS = ROOT / "k8s/components/prometheus"
ENDPOINT = {f"ray_{prometheus_name(m.name)}" for m in (*GRPO, *LIVE)}


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.parametrize("metrics", [GRPO, LIVE, COLD_START])
def test_the_document_has_exactly_the_tables_of_the_code(metrics):
    assert f"\n\n{table(metrics)}\n" in (ROOT / "docs/metrics.md").read_text(), "python -m rl_system.runs.metric_names"


def test_names_are_prometheus_names_and_no_two_become_one():
    names = [m.name for m in (*GRPO, *LIVE)]
    assert len(ENDPOINT) == len(set(names)) == len(names)
    assert all(re.fullmatch(r"ray_rl_[a-z_]+", name) for name in ENDPOINT)


def test_every_panel_of_the_dashboard_asks_for_a_metric_that_exists():
    dashboard = json.loads((PROMETHEUS / "dashboard.json").read_text())
    expressions = [[t["expr"] for t in panel["targets"]] for panel in dashboard["panels"]]
    assert all(expressions) and all(asked(e) and asked(e) <= ENDPOINT for panel in expressions for e in panel)
    (runs,) = (v["query"]["query"] for v in dashboard["templating"]["list"] if v["name"] == "run")
    assert asked(runs) <= ENDPOINT
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(expressions)


def test_every_alert_asks_for_a_metric_that_exists():
    rules = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
    assert all(asked(rule["expr"]) and asked(rule["expr"]) <= ENDPOINT for rule in rules)
    wanted = {"NoProgress", "RewardFailures", "Staleness", "KL", "IdleActors", "IdleLearner"}
    assert wanted <= {rule["alert"] for rule in rules}


def test_the_rate_of_failures_counts_what_was_asked_for():
    meter = PipelineMeter()
    meter.group(scored_group(0, 1.0, failed=2))  # 4 samples: format, degradation, generation; understanding is absent
    metrics = meter.step({}, [scored_group(1, 1.0)])
    assert metrics["failures/rate"] == pytest.approx(1 / 12) and metrics["failures/generation"] == 1
    assert meter.step({}, [scored_group(1, 1.0)])["failures/rate"] == 0.0
    assert np.isfinite(list(metrics.values())).all()
    assert metrics.keys() <= {m.name for m in GRPO}
