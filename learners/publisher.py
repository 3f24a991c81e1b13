"""Sends the learner's weights to the rollout actors, bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch.distributed as dist
from torch import nn

from learners.engine import gathered, whole_shape
from vlcot.weights import Bucket, TensorSpec, WeightSink, checksum, pack, plan_buckets


def weight_layout(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Buckets of whole parameters, in the order of the model; never asks a shard for its size."""
    specs = [TensorSpec(name, whole_shape(p), str(p.dtype).removeprefix("torch.")) for name, p in parameters.items()]
    return plan_buckets(specs, bucket_bytes)


class Publisher:
    """Gathers one bucket at a time on all ranks; only rank 0 copies, checks and sends. Every method is collective."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> None:
        self._parameters = parameters
        self._layout = weight_layout(parameters, bucket_bytes)
        self._leader = dist.get_rank() == 0

    def checksums(self) -> dict[str, int]:
        """XXH3 of every whole tensor on rank 0; empty on the others."""
        found: dict[str, int] = {}
        for bucket in self._layout:
            with gathered([self._parameters[spec.name] for spec in bucket]):
                if self._leader:
                    found |= {spec.name: checksum(self._parameters[spec.name]) for spec in bucket}
        return found

    def push(self, version: int, sink: WeightSink) -> dict[str, float]:
        """Send all weights as ``version`` and wait until every receiver serves them.

        Returns:
            Rank 0: ``time/push_*`` in seconds (``gather``; ``send``: until a bucket was handed over; the receivers'
            phases, whose transfer overlaps with both; ``total``),
            ``weights/{version,bytes,receivers}``. Other ranks: empty.

        Raises:
            RuntimeError: a receiver holds other bytes than were sent (from the sink, on rank 0).
        """
        started = time.perf_counter()
        sums: dict[str, int] = {}
        gather_s = send_s = 0.0
        if self._leader:
            sink.begin(version, self._layout)
        for index, bucket in enumerate(self._layout):
            gather_started = time.perf_counter()
            with gathered([self._parameters[spec.name] for spec in bucket]):
                if self._leader:
                    tensors = {spec.name: self._parameters[spec.name].detach().cpu() for spec in bucket}
                    data = pack(bucket, tensors)  # copies: the gathered values are gone after this block
                    sums |= {name: checksum(tensor) for name, tensor in tensors.items()}
                    del tensors
            gather_s += time.perf_counter() - gather_started
            if self._leader:
                send_started = time.perf_counter()
                sink.send(index, data)
                send_s += time.perf_counter() - send_started
        if not self._leader:
            return {}
        report = sink.finish(sums)
        return {
            "time/push_gather": gather_s,
            "time/push_send": send_s,
            **{f"time/push_{phase}": seconds for phase, seconds in report.seconds.items()},
            "time/push_total": time.perf_counter() - started,
            "weights/version": float(report.version),
            "weights/bytes": float(report.nbytes),
            "weights/receivers": float(report.receivers),
        }
