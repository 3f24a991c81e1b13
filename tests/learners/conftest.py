"""Policies and specs for the learner tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learners.spec import LearnerSpec
from tests.families import random_policy
from vlcot.grpo import LossConfig
from vlcot.policy.model import VlcotForCausalLM


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy."""
    path = tmp_path_factory.mktemp("learners") / "policy"
    random_policy(path, seed=0)
    return path


@pytest.fixture(scope="session")
def reference_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy with noise, so that the KL is not zero."""
    path = tmp_path_factory.mktemp("learners") / "reference"
    random_policy(path, seed=0)
    perturb(VlcotForCausalLM.from_pretrained(path), 0.02).save_pretrained(path)
    return path


def perturb(model: VlcotForCausalLM, scale: float) -> VlcotForCausalLM:
    """Add seeded noise of standard deviation ``scale`` to every weight."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def spec(policy_path: Path, reference_path: Path) -> LearnerSpec:
    """Settings with everything that the oracle knows switched on.

    The rate is low because AdamW's first updates are lr * sign(gradient), also where the gradient is rounding noise.
    """
    return LearnerSpec(
        policy_path=str(policy_path),
        reference_path=str(reference_path),
        steps=5,
        groups_per_step=3,
        temperature=0.9,
        max_staleness=1,
        learning_rate=2e-5,
        weight_decay=0.1,
        warmup_steps=2,
        schedule="cosine",
        max_grad_norm=0.5,
        micro_batch_tokens=150,
        bucket_bytes=100_000,
        checkpoint_every=2,
        max_failures=0,
        loss=LossConfig(kl_beta=0.05),
    )
