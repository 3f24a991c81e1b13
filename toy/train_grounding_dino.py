"""Train the toy GroundingDino: names and boxes of the photographed objects at 64x64, clean and degraded.

``python -m toy.train_grounding_dino`` writes ``toy/weights/grounding_dino/`` (fp16 safetensors, processor files,
card). The scores in the card come from the class that serves the model, ``reward_servers.grounded_sam.Detector``.

Three departures from a plain ``model(labels=...)`` loop, without which so small a model does not learn in minutes:

- The contrastive head has no bias, so its first logits are near 0 and the focal loss drowns in negatives:
  :func:`start_from_rare_objects` puts a prior of about -4 into the layer norms on both sides of the product.
- transformers' loss never reaches the encoder's proposals (their boxes are detached and its ``*_enc`` terms judge the
  learned query embeddings): :func:`dense_loss` supervises every encoder position inside an object, as FCOS does.
- Rare objects are drawn about as often as common ones.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from reward_servers.detection import prompt_text
from reward_servers.grounded_sam import Detector, GroundedSamConfig
from toy.detection_examples import SIZE, Batches, Example, crop_examples, scene_examples
from toy.detector_quality import Quality, heldout_sets, quality
from toy.photographs import object_names

WEIGHTS = Path(__file__).parent / "weights" / "grounding_dino"
MAX_TEXT_LEN = 64
SCENES, CROPS = 4000, 8000
"""Training images, before mirroring and degradation."""

FOCAL_ALPHA = 0.4
"""Share of the positives in the focal loss. The usual 0.25 keeps so small a model's scores below the box threshold."""

_BERT_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
"""GroundingDino's text masks and loss hard-code BERT's ids of these (``SPECIAL_TOKENS`` in its modelling file)."""

_LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
"""GroundingDino's own, see ``GroundingDinoForObjectDetectionLoss``."""


def build_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """One token per name, BERT's ids for the tokens that GroundingDino's text masks look for."""
    words = [f"[unused{i}]" for i in range(max(_BERT_IDS.values()) + 1)]
    for word, index in _BERT_IDS.items():
        words[index] = word
    vocabulary = {word: i for i, word in enumerate([*words, *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, _BERT_IDS[token]) for token in ("[CLS]", "[SEP]")]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TEXT_LEN, **special)


def build_processor(names: list[str]) -> GroundingDinoProcessor:
    """Enlarges (bicubic) or shrinks any image to 64x64."""
    images = GroundingDinoImageProcessor(size={"height": SIZE, "width": SIZE}, resample=Image.Resampling.BICUBIC)
    return GroundingDinoProcessor(images, build_tokenizer(names))


def build_model(vocabulary_size: int) -> GroundingDinoForObjectDetection:
    """About 0.67 M parameters; the encoder sees 16x16 and 8x8 positions."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIZE,
            patch_size=4,
            embed_dim=48,
            depths=[2, 2],
            num_heads=[4, 8],
            window_size=4,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2"],
        ),
        text_config=BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=MAX_TEXT_LEN,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        d_model=64,
        num_queries=16,
        num_feature_levels=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_text_len=MAX_TEXT_LEN,
        dropout=0.0,
        fusion_droppath=0.0,
        auxiliary_loss=True,
        focal_alpha=FOCAL_ALPHA,
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection(config)
    start_from_rare_objects(model)
    return model


@torch.no_grad()
def start_from_rare_objects(model: GroundingDinoForObjectDetection) -> None:
    """Shift the first contrastive logits below -4 and shrink their spread; see the module's docstring."""
    text_norm = model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    text_norm.weight.mul_(0.15)
    text_norm.bias[0] = 2.2
    for norm in (model.model.enc_output_norm, model.model.decoder.layer_norm):
        norm.bias[0] = -2.2


def targets(batch: Sequence[Example], prompt: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Labels as transformers wants them: class = place in the prompt, boxes cx, cy, w, h as shares of the image."""
    place = {name: i for i, name in enumerate(prompt)}
    labels = []
    for example in batch:
        kept = [(place[n], box) for n, box in zip(example.names, example.boxes, strict=True) if n in place]
        corners = torch.tensor([box for _, box in kept], dtype=torch.float32).reshape(-1, 4) / SIZE
        low, high = corners[:, :2], corners[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        labels.append({"class_labels": torch.tensor([c for c, _ in kept], dtype=torch.long), "boxes": boxes})
    return labels


def matched_loss(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """GroundingDino's loss on the matched queries of both decoder layers, without the ``*_enc`` terms."""
    wanted = [(terms[name + suffix], w) for name, w in _LOSS_WEIGHTS.items() for suffix in ("", "_0")]
    return torch.stack([w * term for term, w in wanted]).sum()


def dense_loss(outputs: Any, labels: list[dict[str, torch.Tensor]], length: int) -> torch.Tensor:
    """Focal, L1 and GIoU loss on every encoder position, per true position.

    A position belongs to the smallest object in whose inner half (in width and height) it lies.

    Args:
        outputs: of the model; ``enc_outputs_class`` [B, N, T] logits, ``enc_outputs_coord_logits`` [B, N, 4].
        labels: of :func:`targets`; name ``i`` of the prompt is token ``1 + 2 * i``.
        length: tokens of the prompt.
    """
    logits = outputs.enc_outputs_class[..., :length]
    boxes = outputs.enc_outputs_coord_logits.sigmoid()
    positions = torch.cat([_centres(16), _centres(8)])
    wanted = torch.zeros_like(logits)
    predicted, true = [], []
    for b, label in enumerate(labels):
        owner = _owners(positions, label["boxes"])
        inside = (owner >= 0).nonzero()[:, 0]
        wanted[b, inside, 1 + 2 * label["class_labels"][owner[inside]]] = 1.0
        predicted.append(boxes[b, inside])
        true.append(label["boxes"][owner[inside]])
    found, expected = torch.cat(predicted), torch.cat(true)
    focal = focal_loss(logits, wanted)
    l1 = functional.l1_loss(found, expected, reduction="sum")
    overlap = (1 - giou(found, expected)).sum()
    terms = zip(_LOSS_WEIGHTS.values(), (focal, l1, overlap), strict=True)
    return torch.stack([w * term for w, term in terms]).sum() / max(len(expected), 1)


def _owners(positions: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Index of the object that each position [N, 2] belongs to, -1 for none; boxes cx, cy, w, h."""
    owner = torch.full((len(positions),), -1)
    for i in boxes[:, 2:].prod(-1).argsort(descending=True).tolist():
        reach = (boxes[i, 2:] / 4).clamp(min=0.5 / 8)  # at least one position of the coarse level
        owner[((positions - boxes[i, :2]).abs() <= reach).all(-1)] = i
    return owner


def _centres(side: int) -> torch.Tensor:
    steps = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def focal_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sum of the focal loss with gamma 2 (arXiv 1708.02002)."""
    ce = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    wrong = wanted * (1 - p) + (1 - wanted) * p
    balance = wanted * FOCAL_ALPHA + (1 - wanted) * (1 - FOCAL_ALPHA)
    return (balance * wrong**2 * ce).sum()


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes cx, cy, w, h, row by row."""
    a0, a1 = a[:, :2] - a[:, 2:] / 2, a[:, :2] + a[:, 2:] / 2
    b0, b1 = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    overlap = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    union = a[:, 2:].prod(-1) + b[:, 2:].prod(-1) - overlap
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def train_cycle(
    model: GroundingDinoForObjectDetection,
    processor: GroundingDinoProcessor,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
) -> None:
    """One cycle of training on its own images; learning rate: 50 steps up, then a cosine down to 0."""
    names = object_names()
    model.train()
    batches = Batches(scene_examples(SCENES, "train", seed), crop_examples(CROPS, "train", seed), seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        matched, dense = _losses(model, processor, batches.draw(batch_size), batches.prompt(names))
        optimiser.zero_grad()
        (matched + dense).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step}/{steps} matched {matched:.2f} dense {dense:.2f} {seconds:.0f} s", flush=True)
    model.eval()


def _losses(
    model: GroundingDinoForObjectDetection, processor: GroundingDinoProcessor, batch: list[Example], prompt: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = processor.image_processor(images=[e.image for e in batch], return_tensors="pt")
    text = processor.tokenizer(prompt_text(prompt), return_tensors="pt")
    labels = targets(batch, prompt)
    ids = text.input_ids.expand(len(batch), -1)
    outputs = model(**pixels, input_ids=ids, labels=labels)
    return matched_loss(outputs.loss_dict), dense_loss(outputs, labels, ids.shape[1])


CARD = """# Toy GroundingDino

{parameters:.2f} M parameters, transformers' `GroundingDinoForObjectDetection`, input 64x64, fp16 (load as float32).
Made by `python -m toy.train_grounding_dino --cycles {cycles} --steps {steps} --batch-size {batch_size} --rate {rate:g}
--seed {seed}` in {minutes:.0f} minutes on one CPU thread, from {origin}.

It knows {count} names: {names}.

Data of each cycle: {scenes} composed scenes and {crops} crops of the sixteen photographs (`toy.photographs`,
`toy.scenes`, training split), mirrored at random, half of them degraded as in the toy task (16x16, SeeSR's values) and
enlarged again. A quarter of the crops shows none of the objects. Prompts: all names in random order, or a random part.

Held-out scores at box threshold 0.25, text threshold 0.2, NMS 0.5. A box counts with the right name and IoU of at least
0.5; "names" asks only whether an object is in the image.

| held-out set | true boxes | recall | precision | recall of names | precision of names |
|---|---|---|---|---|---|
{rows}

Limits: it knows these photographs and nothing else; held-out images are new framings of them (see `toy.photographs`).
On degraded images it often misses small objects. On real crops more than half of its boxes are wrong or show only a
part of the named object (cat's fur, the inside of the retina), and thin structures are taken for rockets. Names of more
than one word were never trained.
"""


def write_card(
    folder: Path, model: GroundingDinoForObjectDetection, options: argparse.Namespace, minutes: float
) -> None:
    """Score the saved checkpoint as it is served, and write its README."""
    names = object_names()
    detector = Detector(GroundedSamConfig(str(folder), "", tuple(names)))
    sets = {kind: quality(detector, examples) for kind, examples in heldout_sets().items()}
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        minutes=minutes,
        count=len(names),
        names=", ".join(names),
        scenes=SCENES,
        crops=CROPS,
        origin=f"the checkpoint in {options.start}" if options.start else "random weights",
        rows="\n".join(_row(kind, found) for kind, found in sets.items()),
        **vars(options),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def _row(kind: str, found: Quality) -> str:
    figures = [found.boxes.recall, found.boxes.precision, found.names.recall, found.names.precision]
    return f"| {kind} | {found.boxes.count} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy GroundingDino.")
    parser.add_argument("--cycles", type=int, default=2, help="each with its own images and learning rate cycle")
    parser.add_argument("--steps", type=int, default=4500, help="per cycle")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the first cycle's images; the next one adds 1")
    parser.add_argument("--start", type=Path, help="checkpoint to start from; random weights by default")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    torch.manual_seed(options.seed)
    processor = build_processor(object_names())
    if options.start:
        model = GroundingDinoForObjectDetection.from_pretrained(options.start, dtype=torch.float32)
    else:
        model = build_model(len(processor.tokenizer))
    for cycle in range(options.cycles):
        train_cycle(model, processor, options.steps, options.batch_size, options.rate, options.seed + cycle)
    options.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(options.output)
    processor.save_pretrained(options.output)
    write_card(options.output, model, options, (time.monotonic() - start) / 60)


if __name__ == "__main__":
    main()
