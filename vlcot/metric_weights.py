"""Published metric weights from local files: found by name, handed to pyiqa as if it had downloaded them.

pyiqa downloads what it lacks into torch's hub folder. Here nothing is downloaded: a file is there or its metric is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HEADS = {
    # pyiqa loads these files without asking whether they fill the layers they are for.
    "lpips": tuple(f"lin{layer}.model.1.weight" for layer in range(5)),
    "dists": ("alpha", "beta"),
}


def find(names: Iterable[str], folder: Path | None) -> dict[str, Path]:
    """Where each file is: anywhere under ``folder``, else in torch's hub folder. Absent names are left out."""
    wanted = set(names)
    found: dict[str, Path] = {}
    for root in (Path(torch.hub.get_dir()), folder):
        if root is not None and root.is_dir():
            found |= {file: Path(at) / file for at, _, files in os.walk(root) for file in wanted.intersection(files)}
    return found


def load(pyiqa_name: str, files: Mapping[str, Path], options: Mapping[str, Any]) -> torch.nn.Module:
    """A pyiqa metric on the CPU from local ``files`` (name -> path).

    Raises:
        ValueError: a file cannot be read or does not fit the model.
    """
    import pyiqa

    options = dict(options)
    if pyiqa_name == "clipiqa":
        options["backbone"] = str(files["RN50.pt"])  # by its name pyiqa would compare, and download again
    try:
        with _as_if_downloaded(files), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of arguments that pyiqa chose
            model = pyiqa.create_metric(pyiqa_name, device="cpu", **options)
            if pyiqa_name in HEADS:
                _check_head(model.net, HEADS[pyiqa_name], list(files.values())[-1])
    except Exception as error:  # a broken file fails in as many ways as there are readers
        places = ", ".join(str(path) for path in files.values())
        raise ValueError(f"the weights of {pyiqa_name} cannot be used ({places}): {_first_line(error)}") from error
    return model


def _check_head(net: torch.nn.Module, names: tuple[str, ...], file: Path) -> None:
    head, state = torch.load(file, map_location="cpu", weights_only=True), net.state_dict()
    wrong = [name for name in names if name not in head or not torch.equal(head[name], state[name])]
    if wrong:
        raise ValueError(f"no {', '.join(wrong)} in {file.name}")


@contextlib.contextmanager
def _as_if_downloaded(files: Mapping[str, Path]) -> Iterator[None]:
    """The files where torch.hub and pyiqa look for earlier downloads; timm leaves backbones to the checkpoints."""
    import timm
    from pyiqa.utils import download_util

    hub, cache, create = torch.hub.get_dir(), download_util.DEFAULT_CACHE_DIR, timm.create_model
    with TemporaryDirectory(prefix="metric-weights-") as staged:
        (Path(staged) / "checkpoints").mkdir()
        for name, path in files.items():
            for place in (staged, f"{staged}/checkpoints"):
                os.symlink(path.resolve(), f"{place}/{name}")
        try:
            torch.hub.set_dir(staged)
            download_util.DEFAULT_CACHE_DIR = staged
            timm.create_model = lambda *args, **more: create(*args, **(more | {"pretrained": False}))
            yield
        finally:
            torch.hub.set_dir(hub)
            download_util.DEFAULT_CACHE_DIR, timm.create_model = cache, create


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
