"""From a device's and a model's figures to the pipeline of a cluster: arithmetic, no measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rl_system.studies.scaling.events import EngineCost
from rl_system.studies.scaling.pipeline import KINDS, LearnerCost, Pipeline

SHIPPED = Path(__file__).parent / "costs" / "7b_h100.yaml"

Figures = Mapping[str, Mapping[str, float]]


class CostsRefused(ValueError):
    """A file of costs, or a setting, that cannot be used; the message says what and why."""


@dataclass(frozen=True)
class Allocation:
    """GPUs of each kind; a rollout actor, a detector and an expert have one each."""

    learner: int
    rollout: int
    detector: int
    expert: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.learner + self.rollout + self.detector + self.expert

    def __str__(self) -> str:
        return f"{self.learner}/{self.rollout}/{self.detector}/{self.expert}"


def read_figures(path: Path) -> tuple[str, Figures]:
    """Name and figures of a file of costs, in which each number stands with its source.

    Raises:
        CostsRefused: no such file, not that form, or other names than those of :data:`SHIPPED`.
    """
    given, shipped = _load(path), _load(SHIPPED)
    for section in shipped.keys() | given.keys():
        if section == "name":
            continue
        names, allowed = given.get(section), shipped.get(section, {})
        if not isinstance(names, dict) or names.keys() != allowed.keys():
            raise CostsRefused(
                f"{path}: {section} must give {', '.join(allowed) or 'nothing: there is no such section'}"
            )
        for name, entry in names.items():
            _check_entry(path, f"{section}.{name}", entry)
    sections = {section: names for section, names in given.items() if section != "name"}
    figures = {section: {name: float(entry[0]) for name, entry in names.items()} for section, names in sections.items()}
    return str(given.get("name", path.stem)), figures


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CostsRefused(f"{path}: {error}") from None
    if not isinstance(loaded, dict):
        raise CostsRefused(f"{path} is no file of costs; {SHIPPED} is one")
    return loaded


def _check_entry(path: Path, name: str, entry: Any) -> None:
    good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and entry[1].strip()
    if not good or isinstance(entry[0], bool) or not isinstance(entry[0], int | float) or not 0 < entry[0] < math.inf:
        raise CostsRefused(f"{path}: {name} must be [a positive number, where it comes from], not {entry}")


@dataclass(frozen=True)
class Cluster:
    """What work costs on a cluster.

    Attributes:
        figures: of the file of costs.
        tokenizer_on_gpu: driver and actors run the image tokenizer on a device; the code has it on their CPUs today.
        factors: on the time that each kind takes, by its name in :data:`KINDS`.
    """

    figures: Figures
    tokenizer_on_gpu: bool = False
    factors: Mapping[str, float] | None = None

    def scaled(self, **factors: float) -> Cluster:
        """The same with kinds that are slower (factors above 1) or faster."""
        merged = dict(self.factors or {})
        for kind, factor in factors.items():
            if kind not in KINDS:
                raise CostsRefused(f"there is no '{kind}'; {', '.join(KINDS)}")
            if not 0 < factor < math.inf:
                raise CostsRefused(f"{kind}={factor}: the factor must be positive")
            merged[kind] = merged.get(kind, 1.0) * factor
        return replace(self, factors=merged)

    def changed(self, **values: float) -> Cluster:
        """The same with other figures, each by its ``section__name``."""
        figures = {section: dict(names) for section, names in self.figures.items()}
        for path, value in values.items():
            section, name = path.split("__", 1)
            if name not in figures.get(section, {}):
                raise CostsRefused(f"the costs have no {section}.{name}")
            figures[section][name] = value
        return replace(self, figures=figures)

    def pipeline(self, allocation: Allocation, groups_per_step: int, max_staleness: int) -> Pipeline:
        """The pipeline on this many GPUs.

        Raises:
            CostsRefused: a kind has no GPU, or the learner's share of the model does not fit its GPUs.
        """
        if min(allocation.learner, allocation.rollout, allocation.detector, allocation.expert) < 1:
            raise CostsRefused(f"{allocation}: each kind needs at least one GPU")
        if allocation.learner < (least := self.least_learner_gpus()):
            raise CostsRefused(f"{allocation}: the learner does not fit on fewer than {least} GPUs")
        work = self.figures["work"]
        driver, admit = self._driver()
        return Pipeline(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            group_size=1,  # the chains of a group end within a percent of their length: they are one job
            tokens=work["chain_tokens"],
            tokens_std=work["chain_tokens_std"],
            rollout=self.rollout(),
            detector=self.detector(),
            expert=self.expert(),
            decoder=self._decoder(),
            learner=self.learner(allocation, groups_per_step),
            replicas=(allocation.rollout, allocation.detector, allocation.expert),
            admit_s=admit,
            collect_s=driver,
        )

    # --- learner ----------------------------------------------------------------------------------------

    def least_learner_gpus(self) -> int:
        """Over which the states of ZeRO-3 must be spread to leave room for activations."""
        device, learner = self.figures["device"], self.figures["learner"]
        room = device["memory_bytes"] * device["memory_share"] - learner["activation_bytes"]
        if room <= 0:
            raise CostsRefused("learner.activation_bytes leave no room on a device")
        return math.ceil(learner["bytes_per_parameter"] * self.figures["policy"]["parameters"] / room)

    def sequence_s(self, ranks: int) -> float:
        """Seconds of a rank for one sequence: a micro-batch, whose collectives hide behind its arithmetic or not."""
        policy, work, device, learner = (self.figures[s] for s in ("policy", "work", "device", "learner"))
        length = work["prompt_tokens"] + work["chain_tokens"]
        attention = 4 * policy["hidden"] * policy["layers"] * length / 2
        forward = length * (2 * policy["layer_parameters"] + attention)
        forward += work["chain_tokens"] * 2 * policy["hidden"] * policy["image_ids"]
        arithmetic = learner["forwards"] * forward / (device["peak_flops"] * device["train_utilisation"])
        return max(arithmetic, self._collectives_s(ranks))

    def learner_group_s(self, ranks: int) -> float:
        """Seconds of one GPU for one group, in a step that has many."""
        return self._factor("learner") * self.figures["work"]["group_size"] * self.sequence_s(ranks)

    def _collectives_s(self, ranks: int) -> float:
        network, gathers = self.figures["network"], self.figures["learner"]["gathers"]
        inside = ranks <= network["gpus_per_node"]
        speed = network["utilisation"] * network["inside_node" if inside else "between_nodes"]
        volume = 2 * self.figures["policy"]["parameters"] * (ranks - 1) / ranks
        latency = self.figures["policy"]["layers"] * (ranks - 1) * network["collective_step_s"]
        return gathers * (volume / speed + latency)

    def learner(self, allocation: Allocation, groups_per_step: int) -> LearnerCost:
        """A step: as many sequences as the fullest rank has; then the push."""
        sequences = groups_per_step * self.figures["work"]["group_size"]
        rounds = math.ceil(sequences / allocation.learner)
        factor = self._factor("learner")
        push_s, load_s = self._push(math.ceil(allocation.rollout / self.figures["network"]["gpus_per_node"]))
        step_s = self.figures["learner"]["fixed_s"] + rounds * self.sequence_s(allocation.learner)
        return LearnerCost(fixed_s=factor * step_s, group_s=0.0, push_s=push_s, load_s=load_s)

    def _push(self, nodes: int) -> tuple[float, float]:
        """Seconds of a push while generation goes on, and while it stands still (``actors``: through host memory)."""
        push = self.figures["push"]
        nbytes = 2 * self.figures["policy"]["parameters"]
        sent = nbytes * (1 / push["copy"] + 1 / push["checksum"])
        fetched = nbytes * math.ceil(math.log2(nodes + 1)) / push["object_store"]
        verified = nbytes / push["checksum"]
        return sent + fetched + verified, 2 * nbytes / push["copy"]

    # --- the others -------------------------------------------------------------------------------------

    def rollout(self) -> EngineCost:
        """vLLM; its jobs are groups. Each iteration reads the weights once and the keys and values of every chain."""
        policy, work, device = self.figures["policy"], self.figures["work"], self.figures["device"]
        rollout, group_size = self.figures["rollout"], work["group_size"]
        kv, weights = policy["kv_bytes_per_token"], 2 * policy["parameters"]
        room = device["memory_bytes"] * device["memory_share"] - weights - rollout["activation_bytes"]
        longest_group = kv * (work["prompt_tokens"] + group_size * work["chain_tokens"])
        if (groups := int(room // longest_group)) < 1:
            raise CostsRefused(
                f"a group's {longest_group / 1e9:.0f} GB of keys and values do not fit beside the weights"
            )
        speed = device["bandwidth"] * device["bandwidth_utilisation"]
        read_s = kv * (work["prompt_tokens"] + work["chain_tokens"] / 2) / speed
        prefill_s = 2 * policy["layer_parameters"] * work["prompt_tokens"]
        prefill_s /= device["peak_flops"] * device["prefill_utilisation"]
        each_s = group_size * read_s + prefill_s / work["chain_tokens"]  # a prefill holds up every group of the engine
        factor = self._factor("rollout")
        base_s = weights / speed + rollout["iteration_overhead_s"]
        return EngineCost(factor * base_s, factor * each_s, groups)

    def expert(self) -> EngineCost:
        """Qwen2.5-VL in vLLM: prefill one by one, decoding together."""
        expert, device = self.figures["expert"], self.figures["device"]
        images = self.figures["work"]["group_size"] + 1
        tokens = images * expert["tokens_per_image"] + expert["rubric_tokens"]
        answer = (images - 1) * expert["answer_tokens_per_image"]
        flops = 2 * expert["parameters"] * tokens
        flops += 2 * expert["vision_parameters"] * 4 * images * expert["tokens_per_image"]
        speed = device["bandwidth"] * device["bandwidth_utilisation"]
        prefill_s = flops / (device["peak_flops"] * device["prefill_utilisation"])
        each_s = prefill_s + answer * expert["kv_bytes_per_token"] * tokens / speed
        base_s = answer * (2 * expert["parameters"] / speed + self.figures["rollout"]["iteration_overhead_s"])
        factor = self._factor("expert")
        return EngineCost(factor * base_s, factor * each_s, int(expert["concurrent"]))

    def detector(self) -> EngineCost:
        """Grounded-SAM in fp32, one image after the other."""
        seconds = self.figures["detector"]["flops"] / self._fp32_speed() + self.figures["detector"]["overhead_s"]
        return EngineCost(self._factor("detector") * seconds, 0.0, 1)

    def _decoder(self) -> EngineCost:
        """Images of a group's codes, one group after the other."""
        tokenizer = self.figures["image_tokenizer"]
        speed = (
            self._fp32_speed()
            if self.tokenizer_on_gpu
            else tokenizer["cpu_flops_per_thread"] * tokenizer["actor_threads"]
        )
        seconds = self.figures["work"]["group_size"] * tokenizer["decoder_flops"] / speed
        return EngineCost(self._factor("decoder") * seconds, 0.0, 1)

    def _driver(self) -> tuple[float, float]:
        """Seconds for a group with its rewards, and for one that is admitted: there the LR image is tokenised."""
        tokenizer, group_s = self.figures["image_tokenizer"], self.figures["driver"]["group_s"]
        speed = (
            self._fp32_speed()
            if self.tokenizer_on_gpu
            else tokenizer["cpu_flops_per_thread"] * tokenizer["driver_threads"]
        )
        factor = self._factor("driver")
        return factor * group_s, factor * (group_s + tokenizer["encoder_flops"] / speed)

    def _fp32_speed(self) -> float:
        return self.figures["device"]["peak_flops_fp32"] * self.figures["device"]["fp32_utilisation"]

    def _factor(self, kind: str) -> float:
        return (self.factors or {}).get(kind, 1.0)
