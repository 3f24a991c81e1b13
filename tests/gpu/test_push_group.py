"""Broadcast pushes over NCCL: the group of tests/actors/test_push_group.py on two devices, in two processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from actors.errors import PushLostError
from actors.push import IncomingPush
from actors.push_group import PushGroup, Seat, Sender, receive_all
from vlcot.weights import TensorSpec, checksums, pack, plan_buckets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, and there are not two"),
    pytest.mark.timeout(300),
]
NAMES = ("a", "b", "c")
LAYOUT = plan_buckets([TensorSpec(name, (64, 1024, 1024), "bfloat16") for name in NAMES], 128 << 20)
HERE, TIMEOUT_S = "127.0.0.1", 20.0


def member(seat: Seat, line: Connection, dies: bool) -> None:
    """An actor's part on the second device: join, take a push, and say what came or what went wrong."""
    torch.cuda.set_device(1)
    group, push = PushGroup(seat), IncomingPush(1, LAYOUT)
    try:
        if dies:
            group.receive(push.sizes[0])
            os._exit(9)
        receive_all(group, push)
        line.send(push.check(line.recv()))
    except PushLostError as error:
        line.send(str(error))
    finally:
        push.discard()


class Members:
    """Starts the member when it is invited."""

    def __init__(self, dies: bool) -> None:
        self._dies = dies
        self.line, self._theirs = multiprocessing.Pipe()

    def call(self, seats: list[Seat]) -> None:
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=member, args=(seats[0], self._theirs, self._dies))
        self.process.start()


def send_all(sender: Sender) -> dict[str, int]:
    """Three buckets of 128 MiB; their checksums."""
    torch.cuda.set_device(0)
    tensors = {name: torch.randn(64, 1024, 1024).to(torch.bfloat16) for name in NAMES}
    started = time.perf_counter()
    for bucket in LAYOUT:
        sender.send(pack(bucket, tensors))
    print(f"{3 * 128 / 1024 / (time.perf_counter() - started):.2f} GiB/s from host memory to the broadcast's end")
    return checksums(tensors.items())


def test_what_is_broadcast_over_nccl_arrives() -> None:
    members, sender = Members(dies=False), Sender("nccl", HERE, TIMEOUT_S)
    sender.gather(["one"], members.call)
    sums = send_all(sender)
    assert sender.open
    members.line.send(sums)
    assert members.line.poll(TIMEOUT_S) and members.line.recv() == sums
    members.process.join(TIMEOUT_S)
    sender.close()


def test_a_dead_member_breaks_the_group_within_the_time_out_and_another_comes() -> None:
    members, sender = Members(dies=True), Sender("nccl", HERE, TIMEOUT_S)
    sender.gather(["one"], members.call)
    started = time.monotonic()
    send_all(sender)
    while sender.open and time.monotonic() < started + 4 * TIMEOUT_S:  # the last ones may have been on their way
        sender.send(np.zeros(128 << 20, np.uint8))
    assert not sender.open and time.monotonic() - started < 4 * TIMEOUT_S
    members = Members(dies=False)
    sender.gather(["two"], members.call)
    members.line.send(send_all(sender))
    assert members.line.poll(TIMEOUT_S) and isinstance(members.line.recv(), dict)
    members.process.join(TIMEOUT_S)
    sender.close()
