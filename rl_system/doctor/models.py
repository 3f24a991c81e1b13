"""Sizes of the models: read from their checkpoints, or those of the published ones where there is none yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learners.spec import LoraSpec, linear_shapes
from vlcot.policy.family import Family, read_config
from vlcot.sequence import Layout
from vlcot.weight_import.chameleon import MAX_POSITIONS, ChameleonConfig
from vlcot.weight_import.source import Checkpoint, read_json

PURE_IDS = 73_728
"""Embedding rows of PURE: Chameleon's 65,536 and 8,192 more image ids (domain facts 2.1)."""

CHARACTERS_PER_ID = 3
"""Of an instruction whose tokenizer is not there: fewer than BPE needs, so that no estimate is below the truth."""


@dataclass(frozen=True)
class PolicyShape:
    """What the memory of a policy depends on; the fields are those of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    layout: Layout

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> PolicyShape:
        """From a policy's ``config.json``.

        Raises:
            ValueError: a field is missing, or the layout is impossible.
        """
        try:
            numbers = {name: int(config[name]) for name in cls.__dataclass_fields__ if name != "layout"}
            return cls(**numbers, layout=Layout(**config["layout"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json is no VLCoT policy's: {error}") from None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Channels of all key heads together; of all value heads likewise."""
        return self.num_key_value_heads * self.head_dim

    @property
    def table(self) -> int:
        """Values of the embedding; of the head likewise. The largest tensors."""
        return self.vocab_size * self.hidden_size

    @property
    def layer(self) -> int:
        """Values of one layer: q, k, v and o, the norms of q and k (weight and bias per head), MLP, two norms."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.key_value_size)
        norms = 2 * (self.hidden_size + self.key_value_size)
        return attention + norms + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Values of the decoder, embedding and head untied: 7,080,775,680 for PURE."""
        return 2 * self.table + self.num_hidden_layers * self.layer + self.hidden_size

    def adapters(self, lora: LoraSpec) -> int:
        """Values of LoRA's adapters: rank x (outputs + inputs) of each target."""
        shapes = linear_shapes(self.hidden_size, self.key_value_size, self.intermediate_size)
        return self.num_hidden_layers * lora.rank * sum(sum(shapes[name]) for name in lora.targets)

    def key_value_bytes(self, itemsize: int) -> int:
        """Bytes of the cache for one id."""
        return 2 * self.num_hidden_layers * self.key_value_size * itemsize

    @property
    def image_ids(self) -> tuple[int, int, int]:
        """Ids of the coarse, middle and final image: codes, a new line for each row, start, two sides, end."""
        sides = (size // self.layout.downsample for size in self.layout.image_sizes)
        coarse, middle, final = (side * (side + 1) + 4 for side in sides)
        return coarse, middle, final


@dataclass(frozen=True)
class TokenizerShape:
    """The VQ image tokenizer: values, and channels of its widest maps, which are as large as the image."""

    parameters: int
    channels: int


@dataclass(frozen=True)
class VlmShape:
    """The vision-language model of the expert: values, and bytes of its cache for one id and one byte a value."""

    parameters: int
    key_values: int

    def key_value_bytes(self, itemsize: int) -> int:
        """Bytes of the cache for one id."""
        return self.key_values * itemsize


@dataclass(frozen=True)
class DetectorShape:
    """GroundingDino and SAM.

    Attributes:
        parameters: of both.
        attention: values of one global attention map of SAM's image encoder, heads x tokens^2.
        pixels: of an image as GroundingDino's processor makes it.
    """

    parameters: int
    attention: int
    pixels: int


def published_policy() -> PolicyShape:
    """PURE's, or Lumina-mGPT's grown to PURE's ids."""
    known = ChameleonConfig(vocab_size=PURE_IDS, max_position_embeddings=MAX_POSITIONS)
    numbers = {name: getattr(known, name) for name in PolicyShape.__dataclass_fields__ if name != "layout"}
    return PolicyShape(**numbers, layout=Layout())


PUBLISHED_TOKENIZER = TokenizerShape(70_110_000, 128)
"""LlamaGen's VQ-8 (domain facts 3.1)."""

PUBLISHED_VLM = VlmShape(8_292_166_656, 2 * 28 * 4 * 128)
"""Qwen2.5-VL-7B-Instruct, of which 676,550,144 are the vision tower's; 28 layers, 4 key heads of 128."""

PUBLISHED_DETECTOR = DetectorShape(172_250_626 + 641_090_864, 16 * 64**4, 800 * 1333)
"""grounding-dino-tiny and sam-vit-huge, counted on the meta device with transformers; 64x64 tokens, 16 heads."""


def read_policy(directory: str | Path) -> PolicyShape:
    """Of a policy directory. Raises FileNotFoundError or ValueError for one that cannot be read."""
    return PolicyShape.of_config(read_config(directory))


def read_tokenizer(directory: str | Path) -> TokenizerShape:
    """Of a JanusVQVAE directory. Raises FileNotFoundError or ValueError for one that cannot be read."""
    return TokenizerShape(values_in(directory), int(read_config(directory).get("base_channels", 128)))


def read_vlm(directory: str | Path) -> VlmShape:
    """Of a Qwen2.5-VL directory, old flat ``config.json`` or new. Raises FileNotFoundError or ValueError."""
    config = read_config(directory)
    text = config.get("text_config", config)
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        keys = int(text["num_key_value_heads"]) * int(text["hidden_size"]) // heads
    except KeyError as error:
        raise ValueError(f"{directory}/config.json has no {error}") from None
    return VlmShape(values_in(directory), 2 * layers * keys)


def read_detector(detector: str | Path, segmenter: str | Path) -> DetectorShape:
    """Of a GroundingDino and a SAM directory. Raises FileNotFoundError or ValueError."""
    vision = read_config(segmenter).get("vision_config", {})
    # transformers' SamVisionConfig has these defaults, and writes only what differs
    tokens = (int(vision.get("image_size", 1024)) // int(vision.get("patch_size", 16))) ** 2
    attention = int(vision.get("num_attention_heads", 12)) * tokens**2
    return DetectorShape(values_in(detector) + values_in(segmenter), attention, _detector_pixels(Path(detector)))


def _detector_pixels(directory: Path) -> int:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (directory / name).is_file():
            settings = read_json(directory / name)
            size = settings.get("image_processor", settings).get("size", {})
            if {"height", "width"} <= size.keys():
                return int(size["height"]) * int(size["width"])
            if {"shortest_edge", "longest_edge"} <= size.keys():
                return int(size["shortest_edge"]) * int(size["longest_edge"])
    return PUBLISHED_DETECTOR.pixels


def prompt_ids(shape: PolicyShape, instruction: str, directory: str | Path) -> int:
    """Ids of a prompt: the LR image at full size, the instruction, begin and end of the turn.

    Counted with the policy's tokenizer; without one, :data:`CHARACTERS_PER_ID`.
    """
    text = instruction.replace("<|image|>", "")
    if (Path(directory) / "tokenizer.json").is_file():
        words = len(Family.from_pretrained(directory).text.encode(text))
    else:
        words = -(-len(text) // CHARACTERS_PER_ID)
    return shape.image_ids[2] + words + 2


def values_in(directory: str | Path) -> int:
    """Values in a checkpoint, from the headers of its files alone.

    Raises:
        ValueError: there is none, it is cut off, or a shard is missing; the message names the file.
    """
    return sum(math.prod(tensor.shape) for tensor in Checkpoint.open(directory).tensors.values())
