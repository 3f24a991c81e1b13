"""Bytes that each kind of process holds: pure functions of shapes and settings.

DeepSpeed's part is what its version 0.19.8 allocates for ``learners.engine``'s configuration
(``deepspeed/runtime/zero/stage3.py``, named beside each term), the policy's is what autograd keeps of
``vlcot.policy.model``, counted in ``tests/rl_system/doctor/test_arithmetic.py``. What nothing here can count is an
:data:`ASSUMED` term and says so in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from learners.spec import LoraSpec, linear_shapes
from rl_system.doctor.models import DetectorShape, PolicyShape, TokenizerShape
from vlcot.policy.logprobs import CHUNK_TOKENS

MIB, GIB = 2**20, 2**30

REDUCE_BUCKET = 500_000_000
"""Values in DeepSpeed's gradient bucket (``reduce_bucket_size``)."""
LIVE_PARAMETERS = 1_000_000_000
"""Values of gathered parameters at a time (``stage3_max_live_parameters``)."""
SUB_GROUP = 1_000_000_000
"""Values of a rank that the optimizer updates at a time (``sub_group_size``)."""

CUDA_LEARNER = 4_000_000_000
"""ASSUMED: CUDA context, NCCL's buffers, and what the caching allocator cannot use."""
CUDA_ENGINE = 1_500_000_000
"""ASSUMED: CUDA context and vLLM's CUDA graphs; part of its ``gpu_memory_utilization``."""
VISION_WORK = 2_000_000_000
"""ASSUMED: a forward of Qwen2.5-VL's vision tower over the images of a chat."""
DETECTOR_PIXEL = 1_000
"""ASSUMED: bytes that a forward of GroundingDino takes for each pixel of each image of a batch."""
ATTENTION_MAPS = 3
"""Copies of an attention map that SAM's encoder holds: scores, with relative positions, softmax."""
DECODER_MAPS = 4
"""Widest float32 maps that the VQ decoder holds at a time: input, normalised, convolved, residual."""

SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linear layers that read the input of another one."""

Parts = Mapping[str, float]
"""What stands in memory -> bytes."""


@dataclass(frozen=True)
class Micro:
    """The largest micro-batch of a rank: prompts of one length, and chains of one length under them."""

    prompts: float
    prompt_ids: int
    chains: float
    chain_ids: int

    @property
    def tokens(self) -> float:
        """All of it, padding included."""
        return self.prompts * self.prompt_ids + self.chains * self.chain_ids


def largest_micro(prompt_ids: int, chain_ids: int, group_size: int, groups_of_rank: int, budget: int) -> Micro:
    """The largest that ``learners.batching.plan_micro_batches`` makes.

    Whole groups up to the budget, which shorter chains fill to the last token, so it counts in parts of a group of
    longest ones; chains of one group if it does not hold one; one chain, however long.
    """
    group = prompt_ids + group_size * chain_ids
    if group <= budget:
        groups = min(groups_of_rank, budget / group)
        return Micro(groups, prompt_ids, groups * group_size, chain_ids)
    return Micro(1, prompt_ids, max(1, min(group_size, (budget - prompt_ids) // chain_ids)), chain_ids)


def saved_by_layer(
    shape: PolicyShape, micro: Micro, itemsize: int, *, cuda: bool, lora: LoraSpec | None = None
) -> float:
    """Bytes that autograd keeps of one decoder layer.

    Per token, in values of h hidden, q query, k key and f MLP channels: two RMS norms keep their input in float32 and
    the normalised input; q/k/v projections, o, and gate/up keep one input each (h, q, h); the norms of q and k keep
    their input and the normalised one (2q + 2k); attention keeps q, k, v and its output; SwiGLU keeps four of f. Keys
    and values are kept once per head of the queries. On CUDA they are kept a second time, behind a copy of the
    prompt's for each chain (``vlcot.policy.attention.joined_keys``).

    Under LoRA the norms keep no normalised input, for their weights are frozen, and a projection keeps its input only
    for an adapter. An adapter keeps its ``rank`` values, and with dropout a copy of its input and a mask (a byte on
    CUDA, of the input's dtype on a CPU).
    """
    hidden, query, keys, wide = shape.hidden_size, shape.hidden_size, shape.key_value_size, shape.intermediate_size
    tokens = micro.tokens
    attended = tokens
    if cuda:
        attended += micro.chains * (micro.prompt_ids + micro.chain_ids)
    attention = 2 * tokens * query + 2 * attended * query
    if lora is None:
        norms = 2 * tokens * hidden * (4 + itemsize)
        inputs = 2 * tokens * hidden + tokens * query
        head_norms = 2 * tokens * (query + keys)
        return norms + itemsize * (inputs + head_norms + attention + 4 * tokens * wide)
    frozen = 2 * tokens * hidden * 4 + itemsize * (tokens * (query + keys) + attention + 3 * tokens * wide)
    return frozen + tokens * _adapted(shape, itemsize, lora, cuda=cuda)


def _adapted(shape: PolicyShape, itemsize: int, lora: LoraSpec, *, cuda: bool) -> float:
    """Bytes that the adapters of a layer keep of one token."""
    shapes = linear_shapes(shape.hidden_size, shape.key_value_size, shape.intermediate_size)
    read = {name: shapes[name][1] for name in lora.targets}
    ranks = itemsize * lora.rank * len(read)
    if lora.dropout:
        return ranks + (itemsize + (1 if cuda else itemsize)) * sum(read.values())
    # q, k and v read one tensor, gate and up another
    return ranks + itemsize * sum({SAME_INPUT.get(name, name): width for name, width in read.items()}.values())


def activations(
    shape: PolicyShape, micro: Micro, itemsize: int, *, checkpointing: bool, cuda: bool, lora: LoraSpec | None = None
) -> Parts:
    """Bytes at the peak of backward, in the last layer: what all layers keep, and the gradients on their way.

    With checkpointing every layer keeps its input only, and one layer at a time is computed again.
    """
    layer = saved_by_layer(shape, micro, itemsize, cuda=cuda, lora=lora)
    stream = micro.tokens * shape.hidden_size * itemsize
    kept = shape.num_hidden_layers * stream + layer if checkpointing else shape.num_hidden_layers * layer
    # gradients of the MLP's two products and of the residual stream, beside what is still kept for them
    passing = 2 * micro.tokens * shape.intermediate_size * itemsize + 2 * stream
    return {"activations": kept + passing}


def head(shape: PolicyShape, micro: Micro, itemsize: int, *, frozen: bool = False) -> Parts:
    """Bytes of the log-probs: final norm and hidden states of the chains, one chunk's logits, and the head's gradient.

    The gradient is float32 whatever the dtype (``vlcot.policy.logprobs``), and cast once at the end; a frozen head has
    none.
    """
    hidden = micro.tokens * shape.hidden_size * (4 + 2 * itemsize)
    hidden += 2 * micro.chains * micro.chain_ids * shape.hidden_size * itemsize
    chunk = 3 * min(CHUNK_TOKENS, micro.chains * micro.chain_ids) * shape.vocab_size * 4
    gradient = shape.table * (4 if itemsize == 4 else 4 + itemsize)
    return {"logits": hidden + chunk, "head gradient": 0.0 if frozen else gradient}


def states(parameters: int, ranks: int, itemsize: int, *, reference: bool, adapters: int = 0) -> Parts:
    """Bytes of a rank's shards under ZeRO-3, as counted in its buffers (``tests/rl_system/doctor/zero3_states.py``).

    bf16: weights 2, gradients 2 (``get_data_types``: the gradients' dtype is the model's), float32 copy 4, AdamW's
    moments 8, reference 2: 18 for each value. float32: 4, 4, 4 (a copy too), 8 and 4, 24 in all.
    With so many values of ``adapters`` only these have gradients and an optimizer, and the weights are the reference.
    """
    trained = (adapters or parameters) / ranks
    return {
        "weights": itemsize * (parameters + adapters) / ranks,
        "gradients": itemsize * trained,
        "optimizer": 12 * trained,
        "reference": itemsize * parameters / ranks if reference and not adapters else 0.0,
    }


def gathering(shape: PolicyShape, itemsize: int, trained: int, *, cuda: bool) -> Parts:
    """Bytes of gathered parameters and of the gradient bucket, for so many values that are trained.

    On CUDA the bucket is taken whole (``torch.empty`` of ``reduce_bucket_size``); the kernel of a CPU gives only those
    pages that gradients reach.
    """
    bucket = REDUCE_BUCKET if cuda else min(trained, REDUCE_BUCKET)
    return {"gathered": itemsize * min(shape.parameters, LIVE_PARAMETERS), "gradient bucket": itemsize * bucket}


def reduction(trained: int, ranks: int, itemsize: int) -> Parts:
    """Bytes of a full gradient bucket on its way to the ranks: once more in their order, and this rank's share.

    ``reduce_scatter_coalesced`` in ``deepspeed/runtime/comm/coalesced_collectives.py``.
    """
    return {"reduction": itemsize * min(trained, REDUCE_BUCKET) * (1 + 1 / ranks)}


def update(shape: PolicyShape, trained: int, ranks: int, *, cuda: bool) -> float:
    """Bytes of the optimizer's step beside the states: a float32 gradient of one sub-group, and AdamW's temporaries.

    ``_prepare_fp32_grad_for_sub_group`` flattens a sub-group's gradients into float32; AdamW then makes one more of its
    size on CUDA (foreach: the root of the second moment), two on a CPU (its root, and that divided).
    """
    group = min(trained / ranks, SUB_GROUP + shape.table / ranks)
    return (8 if cuda else 12) * group


def image_decoder(tokenizer: TokenizerShape, side: int, images: int) -> Parts:
    """Bytes of the VQ model in float32, and of decoding so many images of ``side`` pixels at once."""
    maps = DECODER_MAPS * tokenizer.channels * side**2 * 4 * images
    return {"image tokenizer": 4 * tokenizer.parameters, "decoding": maps}


def engine_work(shape: PolicyShape, itemsize: int, batched_ids: int, sequences: int) -> float:
    """Bytes of vLLM's forward over ``batched_ids``: one layer at a time, and float32 logits with two copies."""
    width = 4 * shape.hidden_size + 3 * shape.intermediate_size
    return itemsize * batched_ids * width + 3 * 4 * sequences * shape.vocab_size


def detection(shape: DetectorShape, batch: int) -> Parts:
    """Bytes of GroundingDino and SAM in float32, and of a forward of so many images."""
    return {
        "weights": 4 * shape.parameters,
        "activations": batch * (ATTENTION_MAPS * 4 * shape.attention + DETECTOR_PIXEL * shape.pixels),
    }


def pushed(shape: PolicyShape, itemsize: int, bucket: int) -> float:
    """Bytes of one bucket of a weight push; a tensor that exceeds it is a bucket of its own."""
    return min(max(bucket, shape.table * itemsize), shape.parameters * itemsize)
