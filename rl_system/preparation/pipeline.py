"""The whole preparation: scan, plan, shards by Ray Data, data card, manifest."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from rl_system.config.resume import changed_settings
from rl_system.data.prepared import FORMAT, MANIFEST, SHARDS, schema_description, sha256_of
from rl_system.preparation.plan import Shard, Skipped, extended, scan
from rl_system.preparation.settings import PrepareConfig, identity
from rl_system.preparation.texts import Files
from rl_system.runs.files import write_atomic, write_json


@dataclass(frozen=True)
class Job:
    """What is to be done: every shard of the plan, those that are missing, what was left out, texts, a lock."""

    shards: list[Shard]
    missing: list[Shard]
    skipped: list[Skipped]
    files: Files
    claim: IO[str]


def begin(config: PrepareConfig) -> Job:
    """Scan, check and plan; from here on ``output`` exists. Temporary files of a killed run are removed.

    Raises:
        ValueError: no photograph, ``output`` is of other settings or in use, or texts are missing.
    """
    source, output = Path(config.input), Path(config.output)
    settings = yaml.safe_dump(identity(config), sort_keys=True)
    stored = output / "config.yaml"
    if stored.is_file():
        if changed := changed_settings(stored.read_text(encoding="utf-8"), settings):
            raise ValueError(f"output={output} was prepared with other settings: {'; '.join(changed)}")
    elif output.exists() and (not output.is_dir() or any(entry.name != "lock" for entry in output.iterdir())):
        raise ValueError(f"output={output} exists and is no prepared folder")
    found, skipped = scan(source, config.min_pixels, config.min_file_kib * 1024)
    if not found:
        left = f"; {len(skipped)} were left out, the first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"input={source}: no photograph to prepare{left}")
    files = Files.read(config).of([photo.path for photo in found])
    (output / SHARDS).mkdir(parents=True, exist_ok=True)
    claim = _claim(output)
    write_atomic(stored, settings)
    for rest in (output / SHARDS).glob(".*.tmp"):
        rest.unlink()
    shards = extended(output, found, config.images_per_shard)
    missing = [shard for shard in shards if not (output / SHARDS / shard.name).is_file()]
    return Job(shards, missing, skipped, files, claim)


def make(config: PrepareConfig, job: Job) -> Iterator[Shard]:
    """Make the missing shards in ``workers`` processes of a Ray that runs; gives each as it is done."""
    import ray.data

    from rl_system.preparation.shards import ShardWriter

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    class Work:
        def __init__(self) -> None:
            self._writer = ShardWriter(config)

        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            shard, files = item["work"]
            self._writer.write(shard, files)
            return {"number": shard.number}

    by_number = {shard.number: shard for shard in job.missing}
    items = [{"work": (shard, job.files.of([p.path for p in shard.photographs]))} for shard in job.missing]
    workers = min(worker_count(config), len(items))
    if not items:
        return
    done = ray.data.from_items(items, override_num_blocks=len(items)).map(Work, concurrency=workers, num_cpus=1)
    for row in done.iter_rows():
        yield by_number[int(row["number"])]


def worker_count(config: PrepareConfig) -> int:
    """Processes to start."""
    return config.workers or len(os.sched_getaffinity(0))


def finish(config: PrepareConfig, job: Job) -> dict[str, Any]:
    """Write what is left out, schema, card and, last, the manifest; the manifest is returned."""
    from rl_system.preparation.card import write_card
    from rl_system.preparation.shards import skipped_in

    output = Path(config.output)
    files = [output / SHARDS / shard.name for shard in job.shards]
    skipped = job.skipped + [entry for file in files for entry in skipped_in(file)]
    listed = sorted(skipped, key=lambda entry: entry.path)
    write_atomic(output / "skipped.jsonl", "".join(json.dumps(asdict(entry)) + "\n" for entry in listed))
    write_json(output / "schema.json", schema_description())
    write_card(config, files, listed)
    manifest = {
        "format": FORMAT,
        "images": sum(len(shard.photographs) for shard in job.shards) - (len(skipped) - len(job.skipped)),
        "skipped": len(skipped),
        "rows": sum(_rows(file) for file in files),
        "shards": [_entry(output, file) for file in files],
    }
    write_json(output / MANIFEST, manifest)
    return manifest


def _entry(output: Path, file: Path) -> dict[str, Any]:
    name = file.relative_to(output).as_posix()
    return {"file": name, "rows": _rows(file), "bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _rows(file: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(file).num_rows)


def _claim(output: Path) -> IO[str]:
    """Held until it is closed or this process ends."""
    claim = (output / "lock").open("a")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        claim.close()
        raise ValueError(f"output={output} is being written to by another process: wait for it, or end it") from None
    return claim
