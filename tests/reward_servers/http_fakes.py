"""A replica for the HTTP tests, which answers what it was asked."""

from __future__ import annotations

import numpy as np

from reward_servers.contract import Captions, DetectedObject, Detection, Judgement, Measurement, RewardServerError, Tags

TOKEN = "a-token-of-the-tests-0123456789"
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


class Replica:
    """Scores are means of pixels: an image that changed on its way would change them."""

    async def objects(self, image, names=None, masks=False):
        if image.shape[:2] == (1, 1):
            raise ValueError("an image of 1x1 pixels is too small")
        mask = image[..., 0] > 100
        score = float(image.mean() / 255)
        name = names[0] if names else "cat"
        found = DetectedObject(name, score, (0.1, 0.2, 1 / 3, 1e-17), float(mask.mean()), mask if masks else None)
        return Detection((found,), (name,))

    async def judge(self, lr, images, seed):
        if seed == 1:
            raise RewardServerError("no usable answer after 3 attempts")
        if seed == 2:
            raise KeyError("secret of the server")
        return [Judgement(float(image.mean() / 25.5), float(lr.mean() / 25.5), 1 / 3, "sharp") for image in images]

    async def caption(self, image):
        return Captions("a cat", "a black cat", f"a black cat, {image.sum()}")

    async def tag(self, image):
        return Tags(("cat", "cup"))

    async def measure(self, images, reference=None):
        if reference is None:
            raise ValueError("PSNR compare with a reference image, and none was sent")
        return Measurement({"PSNR": tuple(float(np.abs(i.astype(float) - reference).mean()) for i in images)})

    async def ready(self):
        return {"pid": 1, "versions": {"torch": "2"}, "settings": {}}
