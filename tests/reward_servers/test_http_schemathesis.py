"""The HTTP applications keep to their own OpenAPI description, whatever is sent (Schemathesis)."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from reward_servers.contract import Judgement, Measurement
from reward_servers.http_guard import TOKEN_VARIABLE
from reward_servers.http_images import ImagePayload
from reward_servers.http_routes import ROUTES, replica, routes
from tests.reward_servers.http_fakes import PICTURE, TOKEN, Replica

# Tens of generated requests per route: too slow for the unit tests.
pytestmark = pytest.mark.engine

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
EXAMPLES = 30
IMAGE = ImagePayload.of(PICTURE).model_dump(exclude_none=True)


class Sound(Replica):
    """Answers whatever is asked."""

    async def judge(self, lr, images, seed):
        return [Judgement(5.0, 5.0, 5.0)] * len(images)

    async def measure(self, images, reference=None):
        return Measurement({"PSNR": (30.0,) * len(images)})


def with_real_images(body: dict) -> dict:
    """No JSON schema can say what a PNG is: without this nearly every generated request ends at its image."""
    real = {name: IMAGE for name in ("image", "lr", "reference") if body.get(name) is not None}
    if "seed" in body:
        real["seed"] = int(body["seed"])  # to JSON Schema 1.0 is an integer, the strict model refuses it
    return body | real | ({"images": [IMAGE] * len(body["images"])} if "images" in body else {})


@pytest.mark.parametrize("kind", ["fitting", "real images", "unfitting"])
@pytest.mark.parametrize("server", ROUTES)
def test_every_answer_is_described(server, kind, monkeypatch):
    """Status, content type and schema of each answer; no 500; unfitting requests are refused, real ones answered."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    app = routes(server)
    app.dependency_overrides[replica] = Sound
    # Not schemathesis' own parametrize(): its pytest plugin 4.32 fails under pytest 9.
    description = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    mode = GenerationMode.NEGATIVE if kind == "unfitting" else GenerationMode.POSITIVE
    asked = {}
    for operation in (result.ok() for result in description.get_all_operations()):
        if operation.method == "get" and kind != "fitting":
            continue  # it takes nothing

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case):
            if kind == "real images":
                case.body = with_real_images(case.body)
            left_out = [positive_data_acceptance] if kind == "fitting" else []  # 400: a string that is no image
            response = case.call_and_validate(headers=HEADERS, excluded_checks=left_out)
            asked.setdefault(case.operation.path, set()).add(response.status_code)

        holds()
    assert set(asked) >= {f"/{method}" for method in ROUTES[server]}
    if kind == "real images":
        assert all(statuses == {200} for statuses in asked.values()), asked
