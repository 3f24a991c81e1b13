"""Who names the main objects of an LR image for the understanding reward: the choices of ``reward.objects``."""

from __future__ import annotations

from typing import Protocol

from reward_servers.client import GROUNDED_SAM, QWEN_VL, RewardClient
from vlcot.groups import Failed, Prompt


class ObjectSource(Protocol):
    """Names main objects. ``server`` is whom it waits for, None if for nobody."""

    server: str | None

    async def main_objects(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        """Names of the main objects of the prompt's LR image, lower case; none is an answer too."""


class DetectedObjects:
    """Grounded-SAM with its own vocabulary, as in the paper.

    Args:
        tagged: its vocabulary is what Qwen2.5-VL sees in the image instead, as the published demo lets RAM do it.
    """

    server: str | None = GROUNDED_SAM

    def __init__(self, client: RewardClient, tagged: bool = False) -> None:
        self._client = client
        self._tagged = tagged

    async def main_objects(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        """As :meth:`ObjectSource.main_objects`."""
        names = None
        if self._tagged:
            tags = await self._client.tag(prompt.lr_image)
            if isinstance(tags, Failed):
                return tags
            names = tags.names
        detection = await self._client.objects(prompt.lr_image, names)
        return detection if isinstance(detection, Failed) else detection.main


class TaggedObjects:
    """Qwen2.5-VL alone (the paper's tag ablation): its first names, the most important ones by its own account.

    Args:
        most: how many.
    """

    server: str | None = QWEN_VL

    def __init__(self, client: RewardClient, most: int) -> None:
        self._client = client
        self._most = most

    async def main_objects(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        """As :meth:`ObjectSource.main_objects`."""
        tags = await self._client.tag(prompt.lr_image)
        return tags if isinstance(tags, Failed) else tags.names[: self._most]


class GivenObjects:
    """The data's own names (``data.tags``), as the authors' code reads them."""

    server: str | None = None

    async def main_objects(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        """As :meth:`ObjectSource.main_objects`.

        Raises:
            ValueError: the data name no objects.
        """
        if prompt.objects is None:
            raise ValueError(f"{prompt.row_id}: reward.objects=file needs data that name their objects (data.tags)")
        return prompt.objects
