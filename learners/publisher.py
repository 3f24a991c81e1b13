"""Sends the learner's weights to the rollout actors, bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch.distributed as dist
from torch import nn

from learners.adapters import Weight
from learners.engine import gathered
from vlcot.weights import Bucket, TensorSpec, WeightSink, checksum, pack, plan_buckets


def weight_layout(weights: Mapping[str, Weight], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Buckets of whole tensors, in the order of the model; never asks a shard for its size."""
    return plan_buckets([TensorSpec(name, w.shape, w.dtype) for name, w in weights.items()], bucket_bytes)


class Publisher:
    """Gathers one bucket at a time on all ranks; only rank 0 copies, checks and sends. Every method is collective."""

    def __init__(self, weights: Mapping[str, Weight], bucket_bytes: int) -> None:
        self._weights = weights
        self._layout = weight_layout(weights, bucket_bytes)
        self._leader = dist.get_rank() == 0

    def checksums(self) -> dict[str, int]:
        """XXH3 of every whole tensor on rank 0; empty on the others."""
        found: dict[str, int] = {}
        for bucket in self._layout:
            with gathered(self._parts(bucket)):
                if self._leader:
                    found |= {spec.name: checksum(self._weights[spec.name].value()) for spec in bucket}
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
            with gathered(self._parts(bucket)):
                if self._leader:
                    tensors = {spec.name: self._weights[spec.name].value().cpu() for spec in bucket}
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

    def _parts(self, bucket: Bucket) -> list[nn.Parameter]:
        return [parameter for spec in bucket for parameter in self._weights[spec.name].parameters]
