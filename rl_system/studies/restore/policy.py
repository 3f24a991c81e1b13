"""The policy that restores, and what goes with it: image tokenizer, question, sampling temperature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rl_system.config.compose import CONFIG_DIR
from rl_system.runs.directory import RunDirectory
from rl_system.runs.pictures import STAGES
from vlcot.groups import Prompt
from vlcot.policy.family import Family, read_config
from vlcot.sequence import IMAGE_PLACEHOLDER
from vlcot.tokenizer.image import ImageTokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint needs to restore.

    Attributes:
        policy, image_tokenizer: directories.
        instruction: the question that the policy was trained with.
        temperature: at which training sampled.
    """

    policy: Path
    image_tokenizer: Path
    instruction: str
    temperature: float


def find_checkpoint(path: Path, image_tokenizer: Path | None, instruction: str | None) -> Checkpoint:
    """The checkpoint at ``path``: the directory of a run, or of a policy.

    Image tokenizer, question and temperature are those of the run that the policy lies in, or of the shipped
    ``configs/policy`` that has this path; what is given goes before.

    Raises:
        ValueError: there is no policy, or something that goes with it is nowhere to be found.
    """
    policy = _policy_of(path)
    if not any(policy.glob("*.safetensors")):
        raise ValueError(f"{policy} has no weights (*.safetensors)")
    known = _known(policy)
    tokenizer = image_tokenizer or _optional_path(known.get("image_tokenizer"))
    question = instruction or known.get("instruction")
    if tokenizer is None:
        raise ValueError(f"{policy} is in no run and no shipped configuration: say --image-tokenizer DIR")
    if not (tokenizer / "config.json").is_file():
        raise ValueError(
            f"there is no image tokenizer at {tokenizer} (config.json is missing); say --image-tokenizer DIR"
        )
    if question is None:
        raise ValueError(
            f'the question that {policy} was trained with is not known: say --instruction "... <|image|> ..."'
        )
    if question.count(IMAGE_PLACEHOLDER) != 1:
        raise ValueError(f"--instruction must contain {IMAGE_PLACEHOLDER} exactly once, got {question!r}")
    return Checkpoint(policy, tokenizer, question, float(known.get("temperature", 1.0)))


class QuestionWriter:
    """Writes prompts from pictures of the policy's full size.

    Attributes:
        family: of the policy.
        side: pixels along a side of what the policy sees and draws.
        steps: of ``coarse`` and ``middle``, what it draws first.
        length: ids of a prompt, the same for every picture.

    Args:
        device: of the image tokenizer, which only encodes here.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.family = Family.from_pretrained(checkpoint.policy)
        self.side = self.family.layout.full_size
        self.steps = STAGES[-len(self.family.layout.image_sizes) : -1]
        self._builder = self.family.builder
        self._tokenizer = ImageTokenizer.from_pretrained(checkpoint.image_tokenizer, device)
        self._instruction = checkpoint.instruction
        side = self.side // self.family.layout.downsample
        self.length = len(self._builder.prompt(self._instruction, np.zeros((side, side), np.int64)))

    def prompt(self, group_id: str, seed: int, view: np.ndarray) -> Prompt:
        """The question about ``view``, uint8 [side, side, 3] RGB: the LR image enlarged."""
        codes = self._tokenizer.encode(view[None])[0].cpu().numpy()
        return Prompt(group_id, group_id, seed, self._builder.prompt(self._instruction, codes), view, "")


def positions(policy: Path) -> int:
    """Longest sequence of a policy, prompt and answer."""
    return int(read_config(policy)["max_position_embeddings"])


def cache_bytes(policy: Path, itemsize: int) -> int:
    """Bytes of key/value cache that one sequence of full length takes."""
    config = read_config(policy)
    width = config["num_key_value_heads"] * config["head_dim"]
    return int(2 * config["num_hidden_layers"] * width * itemsize * positions(policy))


def _policy_of(path: Path) -> Path:
    if (path / "config.yaml").is_file():
        run = RunDirectory.open(path)
        policy = run.checkpoints / run.name / "policy"
        if not (policy / "config.json").is_file():
            found = sorted(run.checkpoints.glob("*/policy/config.json"))
            if len(found) != 1:
                raise ValueError(f"the run {path} has no trained policy yet ({policy} is missing)")
            policy = found[0].parent
        return policy
    if not (path / "config.json").is_file():
        raise ValueError(f"--checkpoint {path} is neither a policy (config.json) nor a run (config.yaml)")
    return path


def _known(policy: Path) -> Mapping[str, Any]:
    """Image tokenizer, instruction and temperature, as far as they are written down somewhere."""
    for place in policy.resolve().parents[:3]:  # RUN/checkpoints/NAME/policy
        if (place / "config.yaml").is_file():
            return _said(_read(place / "config.yaml"))
    for settings, root in _shipped():
        if (root / settings["path"]).resolve() == policy.resolve():
            return {**settings, "image_tokenizer": root / settings["image_tokenizer"]}
    return {}


def _said(config: dict[str, Any]) -> Mapping[str, Any]:
    """What the configuration of a run says; the question of a cold start is that of its prepared data."""
    if not isinstance(config.get("policy"), dict):
        return {}
    sampling = config.get("rollout") or config.get("evaluation") or {}
    found = {key: config["policy"].get(key) for key in ("image_tokenizer", "instruction")}
    found["temperature"] = sampling.get("temperature")
    data = config.get("data")
    if found["instruction"] is None and isinstance(data, str) and (Path(data) / "config.yaml").is_file():
        found["instruction"] = _read(Path(data) / "config.yaml").get("instruction")
    return {key: value for key, value in found.items() if value is not None}


def _shipped() -> Iterator[tuple[dict[str, Any], Path]]:
    for file in sorted((CONFIG_DIR / "policy").glob("*.yaml")):
        settings = _read(file)
        for root in (Path.cwd(), CONFIG_DIR.parent):
            yield settings, root


def _read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _optional_path(value: Any) -> Path | None:
    return None if value is None else Path(value)
