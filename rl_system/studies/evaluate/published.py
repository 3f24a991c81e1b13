"""Figures that others published, as printed (those of a log rounded). Nothing here was measured by this project.

The text of the paper's table 1 could not be had first-hand. Two public transcriptions were used; they agree where both
have a figure. What neither has (the paper's other metrics and data sets) is absent rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TABLE_1 = (
    "PSNR, SSIM, NIQE, MUSIQ, MANIQA: RealSR-R1 (arXiv 2506.16796) table 1, second-hand from "
    "KiritoFD/SwinIR-refine docs/baseline/README.md"
)
FLOWSR = "LPIPS, DISTS, FID, CLIPIQA: the OSEDiff paper's table, second-hand from jiaqixuac/FlowSR README.md"
OSEDIFF = (
    "OSEDiff: as these, and cswry/OSEDiff preset/datasets/*/results_osediff/metrics/*.log; TOPIQ: RealSR-R1 table 1"
)


@dataclass(frozen=True)
class Published:
    """``values`` is method -> metric -> the figure as printed; ``images`` is how many images they are over."""

    images: int
    values: Mapping[str, Mapping[str, str]]
    sources: tuple[str, ...]


def _figures(names: str, *figures: str) -> dict[str, str]:
    return dict(zip(names.split(), figures, strict=True))


_FIDELITY = "PSNR SSIM NIQE MUSIQ MANIQA"
_PERCEPTUAL = "LPIPS DISTS FID CLIPIQA"

PUBLISHED = {
    "RealSR": Published(
        images=100,
        values={
            "StableSR": _figures(_FIDELITY, "24.70", "0.7085", "5.91", "65.78", "0.6221")
            | _figures(_PERCEPTUAL, "0.3018", "0.2288", "128.51", "0.6178"),
            "DiffBIR": _figures(_FIDELITY, "24.75", "0.6567", "5.53", "64.98", "0.6246"),
            "SeeSR": _figures(_FIDELITY, "25.18", "0.7216", "5.41", "69.77", "0.6442")
            | _figures(_PERCEPTUAL, "0.3009", "0.2223", "125.55", "0.6612"),
            "PASD": _figures(_FIDELITY, "25.21", "0.6798", "5.41", "68.75", "0.6487"),
            "ResShift": _figures(_FIDELITY, "26.31", "0.7421", "7.26", "58.43", "0.5285")
            | _figures(_PERCEPTUAL, "0.3460", "0.2498", "141.71", "0.5444"),
            "SinSR": _figures(_FIDELITY, "26.28", "0.7347", "6.29", "60.80", "0.5385")
            | _figures(_PERCEPTUAL, "0.3188", "0.2353", "135.93", "0.6122"),
            "OSEDiff": _figures(_FIDELITY, "25.15", "0.7341", "5.65", "69.09", "0.6326")
            | _figures(_PERCEPTUAL, "0.2921", "0.2128", "123.49", "0.6693")
            | {"TOPIQ": "0.7106"},
            "VARSR": _figures(_FIDELITY, "22.57", "0.7268", "6.06", "71.30", "0.6541"),
            "PURE": _figures(_FIDELITY, "22.83", "0.6079", "5.81", "66.75", "0.6310"),
            "RealSR-R1": _figures(_FIDELITY, "22.89", "0.6146", "4.94", "70.36", "0.6491"),
        },
        sources=(TABLE_1, FLOWSR, OSEDIFF),
    ),
    "DRealSR": Published(
        images=93,
        values={
            "OSEDiff": _figures(_FIDELITY, "27.92", "0.7835", "6.4902", "64.65", "0.5895")
            | _figures(_PERCEPTUAL, "0.2968", "0.2165", "135.30", "0.6963")
        },
        sources=("cswry/OSEDiff preset/datasets/benchmark_drealsr/results_osediff/metrics/*.log",),
    ),
}
