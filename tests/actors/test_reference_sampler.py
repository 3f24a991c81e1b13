"""The batched transformers sampler against `plain_decoding`: guided and plain requests in one batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.decoding import PURE, Decoding, EntropyTopK
from actors.reference_sampler import ReferenceSampler
from tests.actors import plain_decoding
from vlcot.grammar import Support
from vlcot.tokenizer.image import ImageTokenizer

pytestmark = pytest.mark.unit

CUT = EntropyTopK(smallest=2, largest=40, midpoint=3.0)
"""Cuts the 64 codes of the test's family at every entropy; PURE's own rule cuts only its sharpest rows."""
MIXED = [Decoding(0.9), Decoding(0.9, guidance=0.5), Decoding(1.2, 3.0, CUT, 5), Decoding(0.8, image_top_k=CUT), PURE]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sampler_of(checkpoints):
    decoder = ImageTokenizer.from_pretrained(checkpoints.vq)

    def make(**changes):
        settings = {"group_size": 2, "temperature": 0.9, "max_new_tokens": 250, "seed": 1, **changes}
        return ReferenceSampler(checkpoints.model, checkpoints.family, decoder, **settings)

    return make


@pytest.fixture(scope="module")
def mixed(checkpoints, sampler_of):
    """One batch of all settings; prompts of two lengths."""
    prompts = [checkpoints.prompt(seed=i, code=i, group=f"g{i}") for i in range(len(MIXED))]
    short = np.delete(prompts[1].ids, slice(1, 4))
    prompts[1] = dataclasses.replace(prompts[1], ids=short)
    return list(zip(sampler_of().generate_batch(prompts, MIXED), MIXED, strict=True))


def test_every_log_prob_is_the_plain_references(checkpoints, mixed):
    kinds = set()
    for group, decoding in mixed:
        for sample in group.samples:
            plain = plain_decoding.logprobs(checkpoints.model, checkpoints.family, group.prompt, sample.ids, decoding)
            assert np.abs(plain - sample.logprobs).max() < TOLERANCE
            kinds |= set(sample.supports.tolist())
    assert kinds == {int(support) for support in Support}


def test_the_plain_reference_would_see_wrong_settings(checkpoints, mixed):
    group, _ = mixed[1]
    sample = max(group.samples, key=lambda s: len(s.ids))
    codes = sample.supports == Support.CODE
    for wrong in (Decoding(0.9), Decoding(0.9, 0.6), Decoding(1.0, 0.5), Decoding(0.9, 0.5, CUT)):
        plain = plain_decoding.logprobs(checkpoints.model, checkpoints.family, group.prompt, sample.ids, wrong)
        assert np.abs(plain - sample.logprobs)[codes].max() > 100 * TOLERANCE


def test_a_sample_does_not_depend_on_its_batch(sampler_of, mixed):
    group, decoding = mixed[1]
    watched: dict[int, list[int]] = {}
    alone = sampler_of().generate(group.prompt, decoding, lambda row, token: watched.setdefault(row, []).append(token))
    assert [s.ids.tolist() for s in alone.samples] == [s.ids.tolist() for s in group.samples]
    assert [watched[row] for row in range(2)] == [s.ids.tolist() for s in alone.samples]
    assert len({s.ids.tobytes() for group, _ in mixed[:3] for s in group.samples}) == 6


@pytest.mark.parametrize("decoding", [Decoding(0.9, 8.0, text_top_k=1), Decoding(1.1, 0.8, CUT, 1)])
def test_guided_codes_are_distributed_as_they_should_be(checkpoints, sampler_of, decoding):
    """Greedy text leads all samples to one prefix; chi-square of the first code there."""
    count, prompt = 500, checkpoints.prompt(seed=3, code=5)
    family, model = checkpoints.family, checkpoints.model
    samples = sampler_of(group_size=count, max_new_tokens=6).generate(prompt, decoding).samples
    at = int(np.argmax(samples[0].supports == Support.CODE))
    start = samples[0].ids.tolist().index(family.vocabulary.image_start)
    prefix = samples[0].ids[:at].tolist()
    assert at > 0 and all(sample.ids[:at].tolist() == prefix for sample in samples)
    drawn = [int(sample.ids[at]) for sample in samples]
    conditional = plain_decoding.logits_of(model, [*prompt.ids, *prefix])[-1]
    unconditional = plain_decoding.logits_of(model, prefix[start:])[-1]
    allowed = family.grammar.support_ids(Support.CODE)

    def p_value(c, u):
        return plain_decoding.p_value(drawn, plain_decoding.distribution(c, u, allowed, Support.CODE, decoding))

    assert p_value(conditional, unconditional) > 1e-3
    if decoding.guidance == 8.0:
        assert p_value(conditional, None) < 1e-6  # the test would see samples without guidance


def test_what_does_not_fit_is_refused(checkpoints, sampler_of):
    with pytest.raises(ValueError, match="more than the policy's 1024 positions"):
        sampler_of(max_new_tokens=1000).generate(checkpoints.prompt(seed=1))
    with pytest.raises(ValueError, match="shorter"):
        sampler_of().generate_batch([checkpoints.prompt(seed=1)], [])
    assert sampler_of().generate_batch([], []) == []
