"""Which files are restored, and what the results are called."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl_system.studies.restore.images import SUFFIXES


@dataclass(frozen=True)
class Job:
    """One picture to restore.

    Attributes:
        source: its file.
        folder: where everything is written.
        name: of the results in there, without suffix; holds the folders between.
    """

    source: Path
    folder: Path
    name: str

    def results(self, samples: int) -> tuple[Path, ...]:
        """The PNG file of each result that is kept: NAME.png, or NAME_1.png and so on."""
        names = [self.name] if samples == 1 else [f"{self.name}_{number + 1}" for number in range(samples)]
        return tuple(self.folder / f"{name}.png" for name in names)

    @property
    def steps(self) -> Path:
        """Folder of coarse and middle images and of the chains."""
        return self.folder / "steps" / self.name

    @property
    def strip(self) -> Path:
        """File of the comparison."""
        return self.folder / "compare" / f"{self.name}.png"


def find_jobs(inputs: Sequence[str], output: Path, samples: int) -> tuple[list[Job], list[str]]:
    """One job per picture, sorted by name; and what was found in folders and is no picture by its name.

    Args:
        inputs: files, folders (not what is in folders inside them) and patterns (``**`` for any depth).
        output: a folder; or, for one input file, the PNG file to write.
        samples: results kept of each.

    Raises:
        ValueError: an input that is not there or holds no picture, an output that cannot be, a result that would
            overwrite an input, or two results of one name.
    """
    found: dict[Path, Path] = {}  # file -> its name below the output
    others: list[str] = []
    for given in inputs:
        for path, below in _expand(given, others):
            found.setdefault(path, below)
    if not found:
        raise ValueError(f"--input: there is no picture in {', '.join(inputs)} (looked for {', '.join(SUFFIXES)})")
    if output.suffix.lower() in SUFFIXES and not output.is_dir():
        jobs = [_single(list(found), output, samples)]
    else:
        shared = Counter(below.with_suffix("") for below in found.values())
        names = {path: b if shared[b.with_suffix("")] > 1 else b.with_suffix("") for path, b in found.items()}
        jobs = [Job(path, output, name.as_posix()) for path, name in names.items()]
    jobs.sort(key=lambda job: job.name)
    _check_overwriting(jobs, samples)
    return jobs, others


def _single(sources: list[Path], output: Path, samples: int) -> Job:
    if len(sources) > 1:
        raise ValueError(f"--output {output} is one file, but there are {len(sources)} inputs: give a folder")
    if output.suffix != ".png":
        raise ValueError(f"--output {output}: results are written as PNG; give a name with .png, or a folder")
    return Job(sources[0], output.parent, output.stem)


def _expand(given: str, others: list[str]) -> Iterator[tuple[Path, Path]]:
    path = Path(given)
    try:
        if path.is_dir():
            yield from _in_folder(path, others)
        elif path.exists():
            yield path, Path(path.name)
        elif glob.has_magic(given):
            yield from _of_pattern(given, others)
        else:
            raise ValueError(f"--input: there is no {given}")
    except OSError as error:
        raise ValueError(f"--input: cannot read {given}: {error.strerror or error}") from error


def _in_folder(folder: Path, others: list[str]) -> Iterator[tuple[Path, Path]]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            yield path, Path(path.name)
        else:
            others.append(f"{path}/" if path.is_dir() else str(path))


def _of_pattern(pattern: str, others: list[str]) -> Iterator[tuple[Path, Path]]:
    fixed = list(Path(pattern).parts)
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    for path in sorted(map(Path, glob.glob(pattern, recursive=True))):
        if path.is_dir():
            continue
        if path.suffix.lower() in SUFFIXES:
            yield path, path.relative_to(Path(*fixed))
        else:
            others.append(str(path))


def _check_overwriting(jobs: Sequence[Job], samples: int) -> None:
    sources = {job.source.resolve() for job in jobs}
    written: dict[Path, Path] = {}
    for job in jobs:
        for result in job.results(samples):
            place = result.resolve()
            if place in sources:
                raise ValueError(f"--output: {result} would overwrite an input; give another folder")
            if other := written.get(place):
                raise ValueError(f"--output: {result} would be the result of both {other} and {job.source}")
            written[place] = job.source
