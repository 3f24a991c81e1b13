"""Train the toy VQ image tokenizer: `python -m toy.train_vq --steps N --seed S --output DIR`.

A JanusVQVAE of 1.15 M parameters learns 64, 32 and 16 px crops of the training photographs, clean and degraded
(LR at a quarter size, bicubic back to 64 px). The codebook lives on the unit sphere as in LlamaGen.

Training starts from a linear teacher, which saves most of the steps: principal components of the 8x8 patches,
lifted to the sphere, and k-means over them. While warming up, the encoder regresses to the teacher's latents and
the decoder reads the teacher's codes. Then all parts train together: straight-through gradients, a codebook that
follows the latents by an exponential moving average, and codes that die put back on a latent of the batch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from toy.photographs import Split, crop
from vlcot.degradation.config import SEESR_TRAINING
from vlcot.degradation.pipeline import degrade
from vlcot.tokenizer.image import ImageTokenizer, apply_norm_groups, nearest_codes, to_signal

CONFIG = JanusVQVAEConfig(
    base_channels=32,
    channel_multiplier=[1, 1, 2, 2],
    num_res_blocks=1,
    latent_channels=64,
    embed_dim=8,
    num_embeddings=512,
    num_patches=8,
    norm_groups=4,
)
POOL = 4096
DEGRADED_POOL = 1536
BATCH = {"clean": 8, "degraded": 4, "half": 4, "quarter": 6}
PEAK_LR = 2e-3
WARM_UP_STEPS = 400
COMMITMENT = 0.25
EDGE = 0.2
CODEBOOK_DECAY = 0.985
DEAD_SHARE = 0.05
"""A code whose moving count is below this share of the mean count is dead."""


def make_pools(split: Split, size: int, degraded: int, seed: int) -> dict[str, np.ndarray]:
    """uint8 pools: clean [size, 64, 64, 3], half and quarter (area-downscaled), and `degraded` LR at 64 px."""
    clean = np.stack([crop(index, split, seed).image for index in range(size)])
    lr = [degrade(image, SEESR_TRAINING, seed + index)[0] for index, image in enumerate(clean[:degraded])]
    return {
        "clean": clean,
        "half": _shrink(clean, 2),
        "quarter": _shrink(clean, 4),
        "degraded": np.stack([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in lr]),
    }


def _shrink(images: np.ndarray, factor: int) -> np.ndarray:
    n, h, w, _ = images.shape
    blocks = images.reshape(n, h // factor, factor, w // factor, factor, 3).astype(np.float32)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


class Teacher:
    """Unit latents from the first D - 1 principal components of 8x8 patches.

    The components keep their common scale, so that distances stay those between patches; a constant last
    coordinate lifts them to the sphere.
    """

    def __init__(self, pools: dict[str, np.ndarray], dim: int, patch: int = 8) -> None:
        patches = torch.cat([_patches(pool[:512], patch) for pool in pools.values()])
        self.mean = patches.mean(0)
        centred = patches - self.mean
        _, _, basis = torch.pca_lowrank(centred, dim - 1, center=False)
        self.filters = basis.T.reshape(dim - 1, 3, patch, patch) / (centred @ basis).norm(dim=-1).square().mean().sqrt()
        self.patch = patch

    def __call__(self, signal: torch.Tensor) -> torch.Tensor:
        """Latents [B, D, h, w] of images [B, 3, H, W]."""
        centred = signal - F.fold(
            self.mean[None, :, None].expand(1, -1, signal[0, 0].numel() // self.patch**2),
            signal.shape[-2:],
            self.patch,
            stride=self.patch,
        )
        components = F.conv2d(centred, self.filters, stride=self.patch)
        return F.normalize(torch.cat([components, torch.ones_like(components[:, :1])], dim=1), dim=1)


def _patches(images: np.ndarray, patch: int) -> torch.Tensor:
    return F.unfold(to_signal(torch.from_numpy(images)), patch, stride=patch).transpose(1, 2).flatten(0, 1)


class Codebook:
    """Unit-norm rows that follow the latents assigned to them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = F.normalize(rows, dim=-1)
        self.sums = self.rows.clone()
        self.counts = torch.ones(len(rows))

    @classmethod
    def from_kmeans(cls, latents: torch.Tensor, size: int, generator: torch.Generator) -> Codebook:
        """Spherical k-means, 10 rounds, over unit latents [N, D]."""
        rows = latents[torch.randperm(len(latents), generator=generator)[:size]]
        for _ in range(10):
            nearest = (latents @ rows.T).argmax(-1)
            sums = torch.zeros_like(rows).index_add_(0, nearest, latents)
            rows = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), rows)
        return cls(rows)

    def follow(self, latents: torch.Tensor, codes: torch.Tensor, generator: torch.Generator) -> None:
        """Move towards the unit latents [N, D] of this step, whose codes are [N]; revive dead rows."""
        sums = torch.zeros_like(self.rows).index_add_(0, codes, latents)
        counts = torch.bincount(codes, minlength=len(self.rows)).float()
        self.sums.lerp_(sums, 1 - CODEBOOK_DECAY)
        self.counts.lerp_(counts, 1 - CODEBOOK_DECAY)
        dead = self.counts < DEAD_SHARE * self.counts.mean()
        picks = torch.randint(len(latents), (int(dead.sum()),), generator=generator)
        self.counts[dead] = self.counts.mean()
        self.sums[dead] = latents[picks] * self.counts.mean()
        self.rows = F.normalize(self.sums, dim=-1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, a fifth of absolute error, and absolute error of the finite differences (edges)."""
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.square().mean() + 0.2 * difference.abs().mean() + EDGE * edges


def train(steps: int, seed: int) -> JanusVQVAE:
    """The trained model, its codebook rows of unit length. Progress goes to the standard output."""
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    pools = make_pools("train", POOL, DEGRADED_POOL, seed)
    teacher = Teacher(pools, CONFIG.embed_dim)
    codebook = Codebook.from_kmeans(
        torch.cat([_flat(teacher(to_signal(torch.from_numpy(pool[:512])))) for pool in pools.values()]),
        CONFIG.num_embeddings,
        generator,
    )
    model = apply_norm_groups(JanusVQVAE(CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    )
    started = time.monotonic()
    for step in range(steps):
        loss = torch.zeros(())
        latents, codes = [], []
        for name, count in BATCH.items():
            target = to_signal(torch.from_numpy(_draw(pools[name], count, rng)))
            with torch.autocast("cpu", torch.bfloat16):
                latent = F.normalize(model.quant_conv(model.encoder(target)).float(), dim=1)
            goal = teacher(target) if step < WARM_UP_STEPS else latent
            code = nearest_codes(goal.detach(), codebook.rows)
            quantised = F.embedding(code, codebook.rows).permute(0, 3, 1, 2)
            if step < WARM_UP_STEPS:
                pull = (latent - goal).square().sum(1).mean()
                shown = quantised
            else:
                pull = COMMITMENT * (latent - quantised).square().sum(1).mean()
                shown = latent + (quantised - latent).detach()
            with torch.autocast("cpu", torch.bfloat16):
                output = model.decoder(model.post_quant_conv(shown)).float()
            loss = loss + count / sum(BATCH.values()) * (pull + reconstruction_loss(output, target))
            latents.append(_flat(latent.detach()))
            codes.append(code.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= WARM_UP_STEPS:
            codebook.follow(torch.cat(latents), torch.cat(codes), generator)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss.item():.4f} pull {pull.item():.4f} seconds {seconds:.0f}", flush=True)
        if step % 200 == 199:
            _report_progress(model, codebook)
    model.quantize.embedding.weight.data.copy_(codebook.rows)
    return model.eval()


def _flat(latents: torch.Tensor) -> torch.Tensor:
    """[B, D, h, w] to [B * h * w, D]."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def _draw(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    images = pool[rng.integers(len(pool), size=count)]
    return np.ascontiguousarray(images[:, :, ::-1] if rng.random() < 0.5 else images)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in dB per image of uint8 [B, H, W, 3] pairs; equal images count as 60 dB."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-6))


def evaluate(tokenizer: ImageTokenizer, count: int = 256, seed: int = 0) -> dict[str, float]:
    """Mean held-out PSNR (dB) per kind of image, and the share of the codebook that these images use."""
    scores: dict[str, float] = {}
    used: set[int] = set()
    for name, images in make_pools("heldout", count, count, seed).items():
        codes = tokenizer.encode(images)
        used.update(codes.unique().tolist())
        scores[f"psnr_{name}"] = round(float(psnr(tokenizer.decode(codes).numpy(), images).mean()), 3)
    scores["codebook_usage"] = round(len(used) / tokenizer.codebook_size, 4)
    return scores


def _report_progress(model: JanusVQVAE, codebook: Codebook) -> None:
    model.quantize.embedding.weight.data.copy_(codebook.rows)
    print(evaluate(ImageTokenizer(model), count=48), flush=True)
    model.train().requires_grad_(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("toy/weights/vq"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    model = train(args.steps, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output)
    scores = evaluate(ImageTokenizer.from_pretrained(args.output))
    scores |= {"steps": args.steps, "seed": args.seed, "train_seconds": round(time.monotonic() - started)}
    (args.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(scores, flush=True)


if __name__ == "__main__":
    main()
