"""A lively random policy, a random image tokenizer and one vLLM engine per module that asks for it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.push import LoadReport
from actors.rollout_actor import RolloutActor
from actors.spec import RolloutSpec
from benchmarks.random_family import write_image_tokenizer
from tests.families import CODEBOOK, INSTRUCTION, random_policy
from vlcot.groups import Prompt, Sample
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM
from vlcot.weights import TensorSpec, checksums, pack, plan_buckets

SPEC_SEED, INDEX = 11, 3


def lively_policy(directory: Path, seed: int) -> VlcotForCausalLM:
    """A random policy that often begins an image and sometimes ends the turn, so that every support occurs."""
    family = random_policy(directory, seed)
    model = VlcotForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_(0, 1)
        embedding[:, 0] += 6  # a component that every hidden state keeps: a bias for the rows below
        head[family.vocabulary.image_start, 0] = 2.0
        head[family.vocabulary.turn_end, 0] = 1.3
    model.save_pretrained(directory)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    policy: Path
    vq: Path
    family: Family
    model: VlcotForCausalLM

    def prompt(self, seed: int, code: int = 0, group: str = "group") -> Prompt:
        ids = self.family.builder.prompt(INSTRUCTION, np.full((8, 8), code, dtype=np.int64))
        return Prompt(group, f"row{code}", seed, ids, np.zeros((64, 64, 3), dtype=np.uint8), "")

    def spec(self, **changes: object) -> RolloutSpec:
        # Room for the 24 chains that tests have under way, and not for 128: then vLLM preempts.
        room = {"kv_cache_gib": 220 * 32 * 1024 / 2**30, "max_num_seqs": 128}  # 220 blocks, 1 KiB an id
        settings = {"group_size": 4, "temperature": 0.9, "max_new_tokens": 250, **room}
        paths = {"policy": str(self.policy), "image_tokenizer": str(self.vq), "seed": SPEC_SEED}
        return RolloutSpec(**{**paths, **settings, **changes})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("actors")
    model = lively_policy(root / "policy", seed=0)
    write_image_tokenizer(root / "vq", CODEBOOK)
    return Checkpoints(root / "policy", root / "vq", Family.from_pretrained(root / "policy"), model)


class EngineUnderTest:
    """The actor, the model whose weights it should have, and one event loop for all tests."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.loop = asyncio.new_event_loop()
        self.actor = RolloutActor(checkpoints.spec(), INDEX)
        self.model = checkpoints.model
        self.version = 0

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 300))

    def set(self, **changes: object) -> None:
        """Change the actor's sampling settings; what the engine itself was built with stays."""
        self.actor._spec = self.checkpoints.spec(**changes)

    async def push(self, model: VlcotForCausalLM, corrupt: str = "") -> LoadReport:
        """Push ``model`` as the next version, as the sink does it; one tensor may be spoilt on the way."""
        tensors = dict(model.named_parameters())
        layout = layout_of(model)
        sums = checksums(tensors.items())
        version = self.version + 1
        await self.actor.begin(version, layout)
        for index, bucket in enumerate(layout):
            sent = {name: t.detach().clone() for name, t in tensors.items()}
            if corrupt:
                sent[corrupt].view(-1)[0] += 1
            await self.actor.receive(version, index, pack(bucket, sent))
        report = await self.actor.finish(version, sums)
        self.version, self.model = version, model
        return report


def layout_of(model: VlcotForCausalLM):
    specs = [TensorSpec(n, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in model.named_parameters()]
    return plan_buckets(specs, 100_000)


@torch.no_grad()
def learner_logprobs(model: VlcotForCausalLM, family: Family, prompt: Prompt, sample: Sample, temperature: float):
    """float32 [T]: the learner's log-probs of a sample."""
    table = SupportTable.of(family.grammar)
    ids = torch.from_numpy(np.concatenate([prompt.ids, sample.ids])).long()[None]
    supports = torch.from_numpy(np.concatenate([np.zeros(len(prompt.ids), np.uint8), sample.supports]))[None]
    return model.token_logprobs(ids, table, supports, temperature)[0, len(prompt.ids) :].numpy()


@pytest.fixture(scope="module")
def engine(checkpoints: Checkpoints):
    engine = EngineUnderTest(checkpoints)
    engine.run(engine.actor.ready())
    yield engine
    engine.actor.shutdown()
    engine.run(asyncio.sleep(0.1))  # lets vLLM's own tasks end before their loop does
    engine.loop.close()
