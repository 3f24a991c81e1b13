"""Best of N on the toy's held-out rows, by the experts that need no weights: `python -m benchmarks.best_of_n`.

One group of 16 chains for each row, restored by the parts of `rl-system restore`. The best of N is chosen among the
first N, which are the N that the command would sample (sample i has the seed of its prompt plus i). Of the chosen ones:
the expert's score, and PSNR and SSIM against the ground truth, which no expert sees. The interval is a bootstrap over
rows of the difference to N = 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from actors.decoding import Decoding
from actors.spec import RolloutSpec
from benchmarks.figures import machine, output_option, write
from rl_system.studies.restore.experts import agreement, likelihood
from rl_system.studies.restore.files import find_jobs
from rl_system.studies.restore.pictures import Drawing
from rl_system.studies.restore.policy import QuestionWriter, find_checkpoint, positions
from rl_system.studies.restore.progress import Progress
from rl_system.studies.restore.run import Batch, Outcome, Wanted
from rl_system.studies.restore.sampling import Queue, Sampler, TransformersSampler, VllmSampler
from toy.rows import row
from vlcot.groups import Sample
from vlcot.metrics import psnr, ssim

COUNTS = (1, 2, 4, 8, 16)
MEASURES = ("agreement", "likelihood", "psnr", "ssim")


def restore_all(rows: range, align: str, backend: str) -> dict[str, np.ndarray]:
    """Measures float64 [rows that were restored, 16], by name in :data:`MEASURES`."""
    checkpoint = find_checkpoint(Path("toy/weights/policy"), None, None)
    writer = QuestionWriter(checkpoint)
    truths = [row(index, "heldout") for index in rows]
    by_input = {truth.lr.tobytes(): index for index, truth in enumerate(truths)}
    found: dict[int, list[tuple[float, ...]]] = {}

    def record(results: Sequence[np.ndarray], source: np.ndarray, chains: Sequence[Sequence[Sample]]) -> list[float]:
        index = by_input[source.tobytes()]
        truth = truths[index].hq
        found[index] = [
            (agreement(result, source), likelihood(of), psnr(result, truth), ssim(result, truth))
            for result, of in zip(results, chains, strict=True)
        ]
        return [0.0] * len(results)

    def start(batch: int) -> Sampler:
        room = positions(checkpoint.policy) - writer.length
        spec = RolloutSpec(
            str(checkpoint.policy),
            str(checkpoint.image_tokenizer),
            group_size=COUNTS[-1],
            temperature=checkpoint.temperature,
            max_new_tokens=room,
            max_num_seqs=batch,
            kv_cache_gib=0.5,
        )
        decoding = Decoding(checkpoint.temperature)
        return VllmSampler(spec, decoding) if backend == "vllm" else TransformersSampler(spec, "cpu", decoding)

    failed: list[Outcome] = []
    with TemporaryDirectory() as folder:
        for index, truth in enumerate(truths):
            Image.fromarray(truth.lr).save(Path(folder) / f"{index:04}.png")
        jobs, _ = find_jobs([folder], Path(folder) / "out", 1)
        wanted = Wanted(Drawing(writer.side, 4.0, writer.side, 0, align, COUNTS[-1]), record)
        progress = Progress(len(rows))
        Batch(jobs, writer, Queue(start, 64, print), wanted, progress, failed.append).run()
    print(progress.line(), [outcome.error for outcome in failed if outcome.error])
    values = np.array([found[index] for index in sorted(found) if len(found[index]) == COUNTS[-1]])
    return dict(zip(MEASURES, np.moveaxis(values, 2, 0), strict=True))


def best_of(measures: dict[str, np.ndarray], expert: str) -> list[dict[str, object]]:
    """One line for each N: means over the rows of what the expert chose among the first N."""
    lines = []
    rows = np.arange(len(measures[expert]))
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(rows), (4000, len(rows)))
    for count in COUNTS:
        chosen = measures[expert][:, :count].argmax(axis=1)
        line: dict[str, object] = {"n": count}
        for name in dict.fromkeys((expert, "psnr", "ssim")):
            values = measures[name][rows, chosen]
            gains = (values - measures[name][:, 0])[draws].mean(axis=1)
            line[name] = round(float(values.mean()), 4)
            line[f"{name}_gain_95"] = [round(float(q), 4) for q in np.quantile(gains, [0.025, 0.975])]
        lines.append(line)
    return lines


def figures(measures: dict[str, np.ndarray], align: str, backend: str) -> dict[str, object]:
    """Everything, with what an expert who knows the truth (psnr) would reach."""
    by_expert = {expert: best_of(measures, expert) for expert in ("agreement", "likelihood", "psnr")}
    return {"machine": machine(), "rows": len(measures["psnr"]), "align": align, "backend": backend, **by_expert}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--align", default="wavelet")
    parser.add_argument("--backend", choices=("vllm", "transformers"), default="vllm")
    output_option(parser, "best_of_n")
    args = parser.parse_args()
    measures = restore_all(range(args.rows), args.align, args.backend)
    write(args.output, figures(measures, args.align, args.backend))


if __name__ == "__main__":
    main()
