"""What a learner rank holds with every weight trained, and with adapters alone: `python -m benchmarks.lora_memory`.

Each side is one process with one ZeRO-3 rank on a CPU: a policy of 58 million float32 values and the reference of the
KL, a pass of the reference, forward, backward and update of one short sequence, and every tensor once as for a push.
Activations are left out, so that what remains is weights, gradients, optimizer and reference. Peaks are the kernel's
own (VmHWM), set back before each phase, without what the process had when its libraries were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from benchmarks.figures import machine, output_option, write

SIDES = {"all weights": 0, "adapters": 8}
"""Name -> rank of the adapters."""
MIB = 2**10
"""KiB in a MiB: /proc counts in KiB."""


class Peaks:
    """MiB at the peak of each phase of this process."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._base = self._read("VmRSS")

    def ends(self, phase: str) -> None:
        """``phase`` began where the last one ended."""
        self.found[phase] = (self._read("VmHWM") - self._base) // MIB
        self.found[f"after {phase}"] = (self._read("VmRSS") - self._base) // MIB
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back (proc(5))

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def one_side(policy_path: str, rank: int) -> None:
    """Print the peaks as JSON."""
    import peft  # noqa: F401  on both sides: a library of the process
    import torch
    import torch.distributed as dist

    from learners.batching import idle_micro_batch
    from learners.engine import BasePolicy, Reference, ShardedPolicy, gathered, join_process_group
    from learners.spec import LearnerSpec, LoraSpec

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", f"file://{policy_path}.meeting", timedelta(seconds=60), 1, 0)
    lora = LoraSpec(rank, 16.0) if rank else None
    spec = LearnerSpec(policy_path, policy_path, 1, 1, 1.0, 0, ranks=1, lora=lora)
    device, peaks = join_process_group(spec), Peaks()
    policy = ShardedPolicy(policy_path, spec, device, trainable=True)
    peaks.ends("loading the policy")
    reference: Reference = BasePolicy(policy)
    if not rank:
        reference = ShardedPolicy(policy_path, spec, device, trainable=False)
    peaks.ends("loading the reference")
    micro = idle_micro_batch(int(policy.family.vocabulary.text_ids[0]))
    with torch.no_grad():
        reference.logprobs(micro)
    policy.backward(policy.logprobs(micro).sum())
    peaks.ends("forward and backward")
    policy.step(1e-6)
    peaks.ends("update")
    for weight in policy.weights().values():
        with gathered(weight.parameters):
            weight.value()
    peaks.ends("push")
    print(json.dumps(peaks.found))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the end of the interpreter (tests.learners.ranks)


def main() -> None:
    """Run both sides, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", nargs=2, metavar=("POLICY", "RANK"), help=argparse.SUPPRESS)
    output_option(parser, "lora_memory")
    options = parser.parse_args()
    if options.side:
        one_side(options.side[0], int(options.side[1]))
    from benchmarks.memory_plan import POLICIES, random_policy

    figures: dict[str, object] = {"machine": machine()}
    peaks = []
    for name, rank in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            policy = Path(folder) / "policy"
            random_policy(policy, **POLICIES["large"])
            command = [sys.executable, "-m", "benchmarks.lora_memory", "--side", str(policy), str(rank)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peaks.append(max(found.values()))
        figures[name] = {"mib": found, "peak_mib": peaks[-1]}
    figures["ratio"] = round(peaks[0] / peaks[1], 2)
    write(options.output, figures)


if __name__ == "__main__":
    main()
