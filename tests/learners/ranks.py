"""ZeRO-3 in processes of its own, without Ray."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from learners.engine import join_process_group


def run_ranks(module: str, jobs: Sequence[Any], ranks: int, directory: Path) -> None:
    """Run ``jobs`` on ``ranks`` processes of ``module``, which calls :func:`work`. Jobs have a ``spec``."""
    path = directory / f"jobs-{ranks}.pkl"
    path.write_bytes(pickle.dumps(list(jobs)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, str(path)]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]


def work(run: Callable[[Any], None]) -> None:
    """One rank: ``run`` every job in one process group. The ranks meet through a file beside the jobs."""
    jobs_path, rank, ranks = sys.argv[1:]
    os.environ |= {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    jobs = pickle.loads(Path(jobs_path).read_bytes())
    meeting = f"file://{jobs_path}.meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=300), int(ranks), int(rank))
    join_process_group(jobs[0].spec)
    for job in jobs:
        run(job)
    dist.destroy_process_group()
    sys.stderr.flush()
    # Threads of gloo and autograd that ask for the interpreter while it ends abort the process, seldom but with all the
    # work done (pytorch/pytorch#38228).
    os._exit(0)
