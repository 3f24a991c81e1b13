"""Make ``torchvision`` importable beside a CPU build of torch.

Some package indexes offer torchvision as a CUDA build only. Beside a CPU torch its C++ operator
library cannot load, and ``import torchvision`` then dies with
``operator torchvision::nms does not exist``; transformers, pyiqa and vLLM all import it.
Declaring the schemas of the two operators that torchvision registers fake kernels for is enough.

``python tools/torchvision_on_cpu.py`` copies this file into site-packages with a ``.pth`` file, so
that every interpreter of the environment (Ray workers, vLLM engine processes) has the hook.
With a CUDA build of torch, or a torchvision whose operators load, it changes nothing.
"""

from __future__ import annotations

import importlib.abc
import shutil
import sys
import sysconfig
from pathlib import Path

_MODULE = "_torchvision_on_cpu"


class _DeclareTorchvisionOps(importlib.abc.MetaPathFinder):
    """Runs once, just before the first ``import torchvision``, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing_ops()
        return None


def _declare_missing_ops() -> None:
    import importlib.util

    import torch

    if torch.version.cuda is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return  # a CPU build: its own operators are registered now
        except OSError:
            break  # a CUDA build: libcudart and friends are absent
    global _library  # torch drops the schemas when the Library object dies
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install() -> Path:
    """Copy this module and its ``.pth`` into the running environment's site-packages."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site_packages / f"{_MODULE}.py")
    (site_packages / f"{_MODULE}.pth").write_text(f"import {_MODULE}\n")
    return site_packages


if __name__ == "__main__":
    print(f"torchvision hook installed in {install()}")
else:
    sys.meta_path.insert(0, _DeclareTorchvisionOps())
