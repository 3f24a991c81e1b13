"""Train the toy Sam: the mask of the object in a box, at 64x64, clean and degraded.

``python -m toy.train_sam`` writes ``toy/weights/sam/`` (fp16 safetensors, processor files, card). Sam never sees a
name; at toy size it learns the shapes in which `toy.scenes` pastes objects.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from reward_servers.grounded_sam import Segmenter
from toy.detection_examples import SIZE, enlarged, low_resolution
from toy.photographs import Split
from toy.scenes import scene

WEIGHTS = Path(__file__).parent / "weights" / "sam"
SCENES = 2500
BOX_JITTER = 1.0
"""Standard deviation of the error of each box edge in training, pixels: detected boxes are never exact."""
_PATCH, _WIDTH = 8, 96


@dataclass(frozen=True, eq=False)
class MaskExample:
    """image uint8 [64, 64, 3], box x0, y0, x1, y1 in pixels and mask bool [64, 64] of one object."""

    image: np.ndarray
    box: tuple[int, int, int, int]
    mask: np.ndarray


def build_processor() -> SamProcessor:
    """Brings the long side of any image to 64 pixels (bicubic) and pads it to a square."""
    square, longest = {"height": SIZE, "width": SIZE}, {"longest_edge": SIZE}
    return SamProcessor(
        SamImageProcessor(
            size=longest,
            mask_size=longest,
            pad_size=square,
            mask_pad_size=square,
            resample=Image.Resampling.BICUBIC,
        )
    )


def build_model() -> SamModel:
    """About 0.6 M parameters: two ViT layers on 8x8 patches, SAM's two-way mask decoder, masks of 32x32 logits."""
    vision = SamVisionConfig(
        hidden_size=_WIDTH,
        output_channels=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=_PATCH,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=_WIDTH // 2,
        mlp_ratio=2.0,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=_WIDTH, image_size=SIZE, patch_size=_PATCH)
    decoder = SamMaskDecoderConfig(
        hidden_size=_WIDTH, mlp_dim=2 * _WIDTH, num_attention_heads=4, iou_head_hidden_dim=_WIDTH
    )
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    # SAM draws its random Fourier features at scale 1; transformers' scale (half the width) makes them noise.
    torch.nn.init.normal_(model.shared_image_embedding.positional_embedding, std=1.0)
    with torch.no_grad():  # the image starts with the same code for a place as the box's corners
        model.vision_encoder.pos_embed.copy_(model.get_image_wide_positional_embeddings().permute(0, 2, 3, 1))
    return model


def mask_examples(count: int, split: Split, seed: int = 0) -> list[MaskExample]:
    """Every object of ``count`` scenes."""
    scenes = (scene(i, split, seed, SIZE) for i in range(count))
    return [MaskExample(s.image, o.box, o.mask) for s in scenes for o in s.objects]


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus Dice of logits and masks [B, H, W]."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return functional.binary_cross_entropy_with_logits(logits, masks) + dice.mean()


def mask_iou(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """IoU [B] of boolean masks [B, H, W]; 0 where both are empty."""
    return (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp(min=1)


def train(steps: int, batch_size: int, rate: float, seed: int) -> tuple[SamModel, SamProcessor]:
    """The trained model and its processor; learning rate: 50 steps up, then a cosine down to 0."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    examples = mask_examples(SCENES, "train", seed)
    model, processor = build_model().train(), build_processor()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        batch = [examples[i] for i in rng.integers(len(examples), size=batch_size)]
        loss, iou = _loss(model, processor, batch, rng)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step}/{steps} loss {loss:.3f} IoU {iou:.3f} {seconds:.0f} s", flush=True)
    return model.eval(), processor


def _loss(
    model: SamModel, processor: SamProcessor, batch: Sequence[MaskExample], rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Loss and mean IoU of a batch, half of it degraded."""
    images = [
        enlarged(low_resolution(e.image, int(rng.integers(2**31)))) if rng.random() < 0.5 else e.image for e in batch
    ]
    boxes = [[(np.array(e.box) + rng.normal(0, BOX_JITTER, 4)).tolist()] for e in batch]
    inputs = processor(images=images, input_boxes=boxes, return_tensors="pt")
    outputs = model(
        pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
    )
    logits = functional.interpolate(outputs.pred_masks[:, 0], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    true = torch.from_numpy(np.stack([e.mask for e in batch]))
    iou = mask_iou(logits > 0, true)
    loss = mask_loss(logits, true.float()) + functional.mse_loss(outputs.iou_scores[:, 0, 0], iou)
    return loss, float(iou.mean())


def heldout_iou(segmenter: Segmenter, count: int = 256) -> dict[str, float]:
    """Mean IoU for the true boxes of ``count`` held-out scenes, as it is served: clean and degraded."""
    clean = mask_examples(count, "heldout")
    degraded = [replace(e, image=enlarged(low_resolution(e.image, i))) for i, e in enumerate(clean)]
    return {kind: _mean_iou(segmenter, examples) for kind, examples in (("clean", clean), ("degraded", degraded))}


def _mean_iou(segmenter: Segmenter, examples: Sequence[MaskExample]) -> float:
    ious = []
    for i in range(0, len(examples), 32):
        batch = examples[i : i + 32]
        boxes = [torch.tensor([e.box], dtype=torch.float32) for e in batch]
        found = torch.stack([masks[0] for masks in segmenter.masks([e.image for e in batch], boxes)])
        ious.append(mask_iou(found, torch.from_numpy(np.stack([e.mask for e in batch]))))
    return float(torch.cat(ious).mean())


CARD = """# Toy Sam

{parameters:.2f} M parameters, transformers' `SamModel`, input 64x64, fp16 weights (load as float32).
Made by `python -m toy.train_sam --steps {steps} --batch-size {batch_size} --rate {rate:g} --seed {seed}` in
{minutes:.0f} minutes on one CPU thread, from random weights.

Data: the objects of {scenes} composed scenes (`toy.scenes`, training split) with their masks, prompted by their boxes
with an error of {jitter:g} pixel, half of the images degraded as in the toy task and enlarged again.

Mean IoU on held-out scenes, prompted by the true boxes: {clean:.3f}; on the same scenes degraded: {degraded:.3f}.

Limits: it knows ellipses and rectangles of 0.4 to 0.7 of the side, pasted on four textures. On real crops, masks of
larger boxes cover about two thirds of the box and those of smaller boxes vary widely: a mask there says roughly how
large an object is, not what its outline is. Points, mask prompts and several masks per prompt were never trained.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy Sam.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    model, processor = train(options.steps, options.batch_size, options.rate, options.seed)
    minutes = (time.monotonic() - start) / 60
    options.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(options.output)
    processor.save_pretrained(options.output)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        minutes=minutes,
        scenes=SCENES,
        jitter=BOX_JITTER,
        **heldout_iou(Segmenter(str(options.output))),
        **vars(options),
    )
    (options.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
