"""The rollout actor on a real vLLM engine (one for the whole module)."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from scipy import stats

from actors.decoding import Decoding, EntropyTopK
from actors.reference_sampler import ReferenceSampler
from actors.samples import RawSample
from tests.actors import plain_decoding
from tests.actors.conftest import INDEX, SPEC_SEED, learner_logprobs, lively_policy
from vlcot.grammar import Support
from vlcot.groups import VersionSpan
from vlcot.tokenizer.image import ImageTokenizer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def usual_settings(engine):
    engine.set()


def disparity(engine, group, temperature=0.9, model=None):
    """Largest difference between sampler's and learner's log-probs over a group."""
    family = engine.checkpoints.family
    return max(
        float(
            np.abs(
                learner_logprobs(model or engine.model, family, group.prompt, sample, temperature) - sample.logprobs
            ).max()
        )
        for sample in group.samples
    )


def same_samples(left, right) -> bool:
    return all(np.array_equal(a.ids, b.ids) for a, b in zip(left.samples, right.samples, strict=True))


async def wait_until_sampling(actor, tokens=4):
    """Return once some open request has that many ids."""
    while True:
        states = actor._engine.output_processor.request_states.values()
        if any(state.detokenizer.num_output_tokens() >= tokens for state in states):
            return
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.0, 1.3])
def test_pitfalls_15_18_21_22_sampler_and_learner_agree(engine, temperature):
    """Temperature, support masks, shift and ratio 1: every log-prob is the learner's, for every support."""
    engine.set(temperature=temperature)
    group = engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1)))
    assert disparity(engine, group, temperature) < TOLERANCE
    assert disparity(engine, group, temperature * 1.1) > 1e-2  # the test would see a wrong temperature
    kinds = np.concatenate([sample.supports for sample in group.samples])
    assert set(kinds) == {int(support) for support in Support}
    logprobs = np.concatenate([sample.logprobs for sample in group.samples])
    assert (logprobs[kinds == Support.FORCED] == 0).all()
    assert (logprobs[kinds != Support.FORCED] < 0).all()


def test_pitfall_21_a_shift_by_one_would_be_seen(engine):
    group = engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1)))
    sample = group.samples[0]
    learner = learner_logprobs(engine.model, engine.checkpoints.family, group.prompt, sample, 0.9)
    assert np.abs(learner[1:] - sample.logprobs[:-1]).max() > 0.1


def test_pitfalls_18_19_chains_end_by_turn_or_length_and_images_are_decoded(engine):
    family, actor = engine.checkpoints.family, engine.actor
    engine.set(group_size=8)
    group = engine.run(actor.generate(engine.checkpoints.prompt(seed=2)))
    assert {sample.finish_reason for sample in group.samples} == {"stop"}
    for sample in group.samples:
        assert sample.ids[-1] == family.vocabulary.turn_end
        assert (sample.ids[:-1] != family.vocabulary.turn_end).all()
        assert sample.supports[-1] in (Support.TEXT, Support.LAST_TEXT)
    engine.set(max_new_tokens=30)
    cut = engine.run(actor.generate(engine.checkpoints.prompt(seed=2)))
    long = [sample for sample in cut.samples if sample.finish_reason == "length"]
    assert long and all(len(sample.ids) == 30 for sample in long)


def test_images_have_their_own_sizes_and_are_the_tokenizers(engine):
    builder = engine.checkpoints.family.builder
    codes = [np.random.default_rng(0).integers(0, 64, (side, side)) for side in (2, 4, 8)]
    ids = builder.chain(("noise", "a", "b", "c"), codes).tolist()
    raw = RawSample(ids, [0.0] * len(ids), (VersionSpan(0, 0, len(ids)),), "stop")
    from actors.samples import build_samples

    tokenizer = ImageTokenizer.from_pretrained(engine.checkpoints.vq)
    samples = build_samples(builder, tokenizer, [raw, raw])
    for side, own, image in zip((16, 32, 64), codes, samples[1].images, strict=True):
        assert image.shape == (side, side, 3) and image.dtype == np.uint8
        assert np.array_equal(image, tokenizer.decode(own[None]).numpy()[0])


def test_pitfall_27_samples_are_distinct_and_reproducible(engine):
    actor, prompt = engine.actor, engine.checkpoints.prompt
    engine.set(group_size=8)
    alone = engine.run(actor.generate(prompt(seed=5)))
    assert len({sample.ids.tobytes() for sample in alone.samples}) == 8

    async def together():
        return await asyncio.gather(*(actor.generate(prompt(seed=seed, group=f"g{seed}")) for seed in (4, 5, 6)))

    crowd = engine.run(together())
    assert same_samples(alone, crowd[1])
    long = [[s.ids.tobytes() for s in group.samples if len(s.ids) > 10] for group in crowd]
    assert all(long) and len({ids for group in long for ids in group}) == sum(map(len, long))


def test_a_group_has_the_same_bits_whatever_else_is_under_way(engine):
    """On one thread the kernels sum each row in one order; an exact resume rests on it (docs/resume.md)."""
    actor, prompt = engine.actor, engine.checkpoints.prompt
    engine.set(group_size=8)
    alone = engine.run(actor.generate(prompt(seed=5)))

    async def together():
        groups = [actor.generate(prompt(seed=seed, group=f"g{seed}")) for seed in (4, 5, 6)]
        return await asyncio.gather(*groups, engine.push(engine.model))

    _, among, _, _ = engine.run(together())
    for left, right in zip(alone.samples, among.samples, strict=True):
        assert np.array_equal(left.ids, right.ids) and np.array_equal(left.logprobs, right.logprobs)


def test_pitfall_27_each_replica_has_its_own_engine_seed(engine):
    info = engine.run(engine.actor.ready())
    assert info["seed"] == SPEC_SEED + INDEX == engine.actor._engine.vllm_config.model_config.seed
    assert info["vllm"] and info["torch"] and info["ray"] and info["pid"] > 0


def test_a_prompt_without_room_is_refused(engine):
    engine.set(max_new_tokens=1000)
    with pytest.raises(ValueError, match="max_new_tokens is 1000"):
        engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1)))


def test_the_group_shares_one_prefix(engine):
    before = engine.run(engine.actor.statistics())["cached_prompt_tokens"]
    engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=7, code=7)))
    assert engine.run(engine.actor.statistics())["cached_prompt_tokens"] > before


def test_reference_sampler_has_the_same_distribution(engine):
    """Both against the exact distribution at the first position, and each other's log-probs to 1e-5."""
    checkpoints = engine.checkpoints
    decoder = ImageTokenizer.from_pretrained(checkpoints.vq)

    def reference(**changes):
        settings = {"group_size": 4, "temperature": 0.9, "max_new_tokens": 250, **changes}
        return ReferenceSampler(engine.model, checkpoints.family, decoder, seed=1, **settings)

    group = reference().generate(checkpoints.prompt(seed=1))
    assert disparity(engine, group) < TOLERANCE
    assert len({sample.ids.tobytes() for sample in group.samples}) == 4
    assert same_samples(group, reference().generate(checkpoints.prompt(seed=1)))

    engine.set(group_size=256, max_new_tokens=1)
    prompt = checkpoints.prompt(seed=9)
    for first in (
        engine.run(engine.actor.generate(prompt)),
        reference(group_size=256, max_new_tokens=1).generate(prompt),
    ):
        assert first_id_p_value(engine, prompt, [int(sample.ids[0]) for sample in first.samples]) > 1e-3


def first_id_p_value(engine, prompt, drawn):
    """Chi-square of first ids against the exact distribution, rare ids in one bin."""
    import torch

    allowed = engine.checkpoints.family.grammar.support_ids(Support.TEXT)
    with torch.no_grad():
        logits = engine.model(torch.from_numpy(prompt.ids).long()[None]).logits[0, -1, allowed]
    exact = (logits.double() / 0.9).softmax(0).numpy()
    common = exact > 0.02
    assert common.sum() >= 4
    counts = np.array([drawn.count(int(token)) for token in allowed])
    observed = [*counts[common], counts[~common].sum()]
    expected = np.array([*exact[common], exact[~common].sum()]) * len(drawn)
    assert sum(observed) == len(drawn)
    return stats.chisquare(observed, expected).pvalue


CUT = EntropyTopK(smallest=2, largest=40, midpoint=3.0)  # cuts the 64 codes of this family at every entropy


def plain_disparity(engine, group, decoding):
    """Largest difference between the log-probs of a group and those of the plain reference."""
    model, family = engine.model, engine.checkpoints.family
    return max(
        np.abs(plain_decoding.logprobs(model, family, group.prompt, sample.ids, decoding) - sample.logprobs).max()
        for sample in group.samples
    )


def test_top_k_requests_and_plain_ones_share_a_batch(engine):
    prompt, generate = engine.checkpoints.prompt, engine.actor.generate
    plain, top_k = Decoding(0.9), [Decoding(0.9, image_top_k=CUT), Decoding(1.2, image_top_k=CUT, text_top_k=3)]
    alone = engine.run(generate(prompt(seed=5)))

    async def together():
        cut = (generate(prompt(seed=5, group=f"top-k {d}"), decoding=d) for d in top_k)
        return await asyncio.gather(generate(prompt(seed=5)), *cut)

    groups = engine.run(together())
    for left, right in zip(alone.samples, groups[0].samples, strict=True):
        assert np.array_equal(left.ids, right.ids) and np.array_equal(left.logprobs, right.logprobs)
    for group, decoding in zip(groups, [plain, *top_k], strict=True):
        assert plain_disparity(engine, group, decoding) < 1e-4
    assert plain_disparity(engine, groups[1], plain) > 1e-2  # the test would see a missing top-k


def test_top_k_requests_survive_preemption(engine):
    """More chains than the cache holds: the last ones are thrown out, read again and go on, cut as before."""
    engine.set(group_size=64)
    prompt, generate = engine.checkpoints.prompt, engine.actor.generate
    decodings = [Decoding(0.9), Decoding(0.9, image_top_k=CUT, text_top_k=5)]

    async def crowded():
        requests = (generate(prompt(seed=i, group=f"g{i}"), decoding=d) for i, d in enumerate(decodings))
        work = asyncio.gather(*requests)
        return await preempted_requests(engine.actor, work), await work

    preempted, groups = engine.run(crowded())
    assert any("g1-" in name for name in preempted), preempted
    for group, decoding in zip(groups, decodings, strict=True):
        assert plain_disparity(engine, group, decoding) < 1e-4


async def preempted_requests(actor, work):
    """Names of the requests that stood still while another that had begun wrote eight ids."""
    found, then = set(), {}  # name -> what all had written when its own count last changed
    while not work.done():
        states = actor._engine.output_processor.request_states
        now = {name: state.detokenizer.num_output_tokens() for name, state in states.items()}
        for name, count in now.items():
            if then.setdefault(name, now)[name] != count:
                then[name] = now
            if count and any(now.get(other, 0) - before >= 8 for other, before in then[name].items() if before):
                found.add(name)
        await asyncio.sleep(0.005)
    return found


def test_top_k_has_one_distribution_in_both_samplers(engine):
    """Greedy text leads to one prefix; chi-square of the first code, against the plain reference."""
    checkpoints, decoding = engine.checkpoints, Decoding(1.1, image_top_k=CUT, text_top_k=1)
    prompt, family = checkpoints.prompt(seed=14), checkpoints.family
    engine.set(group_size=400, max_new_tokens=6)
    decoder = ImageTokenizer.from_pretrained(checkpoints.vq)
    settings = {"group_size": 400, "temperature": 0.9, "max_new_tokens": 6}
    reference = ReferenceSampler(engine.model, family, decoder, **settings)
    groups = engine.run(engine.actor.generate(prompt, decoding=decoding)), reference.generate(prompt, decoding)
    samples = [sample for group in groups for sample in group.samples]
    at = int(np.argmax(samples[0].supports == Support.CODE))
    prefix, allowed = samples[0].ids[:at].tolist(), family.grammar.support_ids(Support.CODE)
    logits = plain_decoding.logits_of(engine.model, [*prompt.ids, *prefix])[-1]
    exact = plain_decoding.distribution(logits, None, allowed, Support.CODE, decoding)
    assert at > 0 and 1 < (exact > 0).sum() < len(allowed)
    for group in groups:
        assert all(sample.ids[:at].tolist() == prefix for sample in group.samples)
        assert plain_decoding.p_value([int(sample.ids[at]) for sample in group.samples], exact) > 1e-3


def test_guidance_is_refused_where_it_cannot_be(engine):
    with pytest.raises(ValueError, match="reference sampler"):
        engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1), decoding=Decoding(guidance=0.8)))


def test_pitfall_26_a_push_replaces_every_tensor(engine, tmp_path):
    """New weights: log-probs are the new model's, checksums those of the sender, every parameter compared."""
    prompt = engine.checkpoints.prompt(seed=1)
    before = engine.run(engine.actor.generate(prompt))
    old = engine.model
    other = lively_policy(tmp_path / "other", seed=1)
    report = engine.run(engine.push(other))
    assert report.version == engine.version and report.loaded == len(dict(other.named_parameters()))
    assert set(report.seconds) == {"transfer", "verify", "pause", "load", "resume"}
    after = engine.run(engine.actor.generate(prompt))
    assert disparity(engine, after) < TOLERANCE
    assert disparity(engine, after, model=old) > 0.1
    assert not same_samples(before, after)
    assert {span.version for sample in after.samples for span in sample.versions} == {engine.version}
    assert not list(engine.actor._pushes)


def test_pitfall_24_new_requests_never_meet_blocks_of_old_weights(engine, tmp_path):
    """The same prompt before and after a push: log-probs of the very first ids are the new model's."""
    prompt = engine.checkpoints.prompt(seed=8, code=3)
    engine.set(group_size=1)
    engine.run(engine.actor.generate(prompt))
    engine.run(engine.push(lively_policy(tmp_path / "other", seed=2)))
    cached = engine.run(engine.actor.statistics())["cached_prompt_tokens"]
    group = engine.run(engine.actor.generate(prompt))
    assert engine.run(engine.actor.statistics())["cached_prompt_tokens"] == cached
    assert disparity(engine, group) < TOLERANCE


def test_pitfall_25_a_push_in_mid_generation_splits_the_spans_and_the_request_goes_on(engine, tmp_path):
    engine.set(group_size=12)
    old, old_version = engine.model, engine.version
    other = lively_policy(tmp_path / "other", seed=3)

    async def both():
        task = asyncio.create_task(engine.actor.generate(engine.checkpoints.prompt(seed=10)))
        await wait_until_sampling(engine.actor)
        await engine.push(other)
        return await task

    group = engine.run(both())
    split = [sample for sample in group.samples if len(sample.versions) == 2]
    assert split
    for sample in split:
        first, second = sample.versions
        assert (first.version, second.version) == (old_version, engine.version)
        assert first.start == 0 and 0 < first.end == second.start < second.end == len(sample.ids)
        assert sample.oldest_version == old_version
        learner = learner_logprobs(old, engine.checkpoints.family, group.prompt, sample, 0.9)
        own = slice(first.start, first.end)
        assert np.abs(learner[own] - sample.logprobs[own]).max() < TOLERANCE
        assert sample.finish_reason == "stop" or len(sample.ids) == 250


def test_pitfall_25_interrupted_equals_uninterrupted_when_the_weights_are_equal(engine):
    engine.set(group_size=12)
    prompt = engine.checkpoints.prompt(seed=12)
    quiet = engine.run(engine.actor.generate(prompt))

    async def both():
        task = asyncio.create_task(engine.actor.generate(prompt))
        await wait_until_sampling(engine.actor)
        await engine.push(engine.model)
        return await task

    disturbed = engine.run(both())
    assert any(len(sample.versions) == 2 for sample in disturbed.samples)
    assert same_samples(quiet, disturbed)
    assert disparity(engine, disturbed) < TOLERANCE


def test_chains_that_begin_again_at_a_push_are_those_of_the_new_weights(engine, tmp_path):
    """``on_push=restart``: no chain has ids of two versions, and none reads key/value blocks of the old one."""
    engine.set(group_size=12, on_push="restart")
    prompt, old_version = engine.checkpoints.prompt(seed=14), engine.version
    old = engine.run(engine.actor.generate(prompt))
    discarded = engine.run(engine.actor.statistics())["discarded_tokens"]

    async def both():
        task = asyncio.create_task(engine.actor.generate(prompt))
        await wait_until_sampling(engine.actor, tokens=30)
        await engine.push(lively_policy(tmp_path / "other", seed=5))
        return await task

    disturbed = engine.run(both())
    new = engine.run(engine.actor.generate(prompt))
    versions = [[span.version for span in sample.versions] for sample in disturbed.samples]
    assert [old_version] in versions and [engine.version] in versions  # some had ended before the push
    for ours, before, after, version in zip(disturbed.samples, old.samples, new.samples, versions, strict=True):
        whole = before if version == [old_version] else after
        assert np.array_equal(ours.ids, whole.ids) and np.array_equal(ours.logprobs, whole.logprobs)
    assert disturbed.discarded_tokens >= 30 and new.discarded_tokens == 0
    assert engine.run(engine.actor.statistics())["discarded_tokens"] == discarded + disturbed.discarded_tokens


def test_a_spoilt_bucket_is_refused_by_name_and_the_old_weights_serve_on(engine, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        engine.run(engine.push(lively_policy(tmp_path / "other", seed=4), corrupt=name))
    group = engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=13)))
    assert disparity(engine, group) < TOLERANCE
    assert group.samples[0].versions[0].version == engine.version


def test_weights_that_are_too_old_are_not_used(engine):
    from actors.errors import StaleWeightsError

    with pytest.raises(StaleWeightsError):
        engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1), minimum_version=engine.version + 1))


def test_an_actor_whose_weights_a_push_broke_refuses_to_generate(engine):
    from actors.errors import EngineLostError

    engine.actor._broken = "loading weights 9 failed"
    with pytest.raises(EngineLostError, match="loading weights 9 failed"):
        engine.run(engine.actor.generate(engine.checkpoints.prompt(seed=1)))
    engine.actor._broken = ""


def test_a_push_unknown_to_the_actor_is_refused(engine):
    from actors.errors import PushLostError

    with pytest.raises(PushLostError):
        engine.run(engine.actor.receive(999, 0, np.zeros(1, np.uint8)))


def test_z_statistics_count_what_happened(engine):
    statistics = engine.run(engine.actor.statistics())
    assert statistics["tokens"] > 1000 and statistics["groups"] > 10 and statistics["pushes"] >= 3
    assert 0 < statistics["paused_s"] < statistics["busy_s"]
    assert statistics["weight_version"] == engine.version
