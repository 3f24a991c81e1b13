"""Settings of the visual expert, refused before any engine starts."""

from __future__ import annotations

import pytest

from reward_servers.qwen_vl import VisualExpert, VisualExpertConfig

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_images", 0),
        ("max_model_len", 1.5),
        ("repeats", 0),
        ("retries", -1),
        ("threads", True),
        ("max_num_seqs", 0),
        ("tensor_parallel_size", 0),
        ("seed", -1),
        ("dtype", "fp32"),
        ("kv_cache_gib", 0),
        ("gpu_memory_utilization", 1.2),
    ],
)
def test_a_wrong_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"qwen_vl\.{setting} must"):
        VisualExpertConfig(model="anywhere", **{setting: value})


def test_a_folder_without_checkpoint_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"qwen_vl\.model: no checkpoint at {tmp_path}"):
        VisualExpert(VisualExpertConfig(model=str(tmp_path)))
