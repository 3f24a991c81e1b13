"""A batch of pictures through one sampler: whatever is wrong with one of them, the others are restored."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rl_system.doctor.machine import free_memory
from rl_system.studies.restore import output
from rl_system.studies.restore.experts import Score
from rl_system.studies.restore.files import Job
from rl_system.studies.restore.images import ImageRefused, Photograph, read_photograph, read_size
from rl_system.studies.restore.pictures import Drawing, OpenPicture
from rl_system.studies.restore.policy import QuestionWriter
from rl_system.studies.restore.progress import Progress
from rl_system.studies.restore.sampling import Queue, SamplingFailed
from vlcot.groups import Group, Prompt, Sample

ATTEMPTS = 4
"""Times that a tile is asked for, with other seeds, until its chains are complete."""


@dataclass(frozen=True)
class Wanted:
    """What is made of each picture.

    Attributes:
        drawing: how it is restored.
        best: chooses the one result to keep; None keeps all.
        save_steps, compare, skip_existing: as on the command line.
    """

    drawing: Drawing
    best: Score | None = None
    save_steps: bool = False
    compare: bool = False
    skip_existing: bool = False

    @property
    def kept(self) -> int:
        """Results that are written of a picture."""
        return 1 if self.best else self.drawing.samples


@dataclass
class Outcome:
    """What became of one picture; one line of the machine-readable log.

    Attributes:
        file: the input.
        status: what happened.
        error: why it failed.
        outputs: results that were written.
        input_size, output_size: width and height.
        tiles, tokens: that the policy drew, and wrote for it.
        retries: tiles asked for again, as a chain was not complete.
        seconds: from opening the file to the last result; other pictures were under way as well.
        scores: of each sample, by the expert that chose.
        chosen: number of the sample that was kept, from 1.
        notes: what the result does not keep of the input.
    """

    file: str
    status: Literal["restored", "skipped", "failed"] = "failed"
    error: str = ""
    outputs: list[str] = field(default_factory=list)
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    tiles: int = 0
    tokens: int = 0
    retries: int = 0
    seconds: float = 0.0
    scores: list[float] | None = None
    chosen: int | None = None
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(eq=False)
class _Work:
    """One picture under way, the ``number``-th that was opened."""

    number: int
    job: Job
    outcome: Outcome
    picture: OpenPicture
    opened: float
    partial: dict[int, list[Sample | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tile:
    work: _Work
    index: int
    attempt: int


class Batch:
    """Restores pictures, reading the next ones only when the sampler has room.

    Args:
        done: told of each picture when it is finished, whatever became of it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        writer: QuestionWriter,
        queue: Queue,
        wanted: Wanted,
        progress: Progress,
        done: Callable[[Outcome], None],
    ) -> None:
        self._jobs = deque(jobs)
        self._writer = writer
        self._queue = queue
        self._wanted = wanted
        self._progress = progress
        self._done = done
        self._under_way: set[_Work] = set()
        self._opened = 0
        self._asked: dict[str, _Tile] = {}
        self._again: deque[_Tile] = deque()
        self._fresh = self._tiles()

    def run(self) -> None:
        """Restore all. Errors of single pictures are in their outcomes; the sampler is closed in the end."""
        try:
            prompt = self._next()
            while prompt is not None or self._asked:
                while prompt is not None and self._queue.room:
                    self._progress.started()
                    self._queue.submit(prompt)
                    prompt = self._next()
                if (group := self._queue.finished()) is not None:
                    self._take(group)
                prompt = prompt or self._next()
        except SamplingFailed as error:
            self._give_up(str(error))
        finally:
            self._queue.close()

    # --- prompts ----------------------------------------------------------------------------------------

    def _next(self) -> Prompt | None:
        while (tile := self._again.popleft() if self._again else next(self._fresh, None)) is not None:
            if tile.work not in self._under_way:
                continue  # it failed meanwhile
            name = f"{tile.work.number}/{tile.index}/{tile.attempt}"  # engines want UTF-8, file names need not be
            seed = tile.index + (tile.attempt << 32)
            try:
                prompt = self._writer.prompt(name, seed, tile.work.picture.view(tile.index))
            except Exception as error:  # as in _open
                self._end(tile.work, error)
                continue
            self._asked[name] = tile
            return prompt
        return None

    def _tiles(self) -> Iterator[_Tile]:
        """Tiles of one picture after the other; a picture is opened when its first tile is wanted."""
        while self._jobs:
            job = self._jobs.popleft()
            outcome = Outcome(str(job.source))
            if self._wanted.skip_existing and all(p.is_file() for p in job.results(self._wanted.kept)):
                outcome.status = "skipped"
                self._progress.dropped(tiles_of(job, self._wanted.drawing))
                self._done(outcome)
                continue
            work = self._open(job, outcome)
            if work is not None:
                yield from (_Tile(work, index, 0) for index in range(outcome.tiles))

    def _open(self, job: Job, outcome: Outcome) -> _Work | None:
        opened = time.monotonic()
        drawing = self._wanted.drawing
        try:
            photograph = read_photograph(job.source)
            height, width = photograph.size
            outcome.input_size, outcome.output_size = (width, height), drawing.target(height, width)[::-1]
            outcome.notes = list(photograph.notes)
            _check_memory(photograph, drawing)
            work = _Work(self._opened, job, outcome, OpenPicture.of(photograph, drawing), opened)
        except Exception as error:  # one picture's trouble, of any kind, is not the batch's
            self._failed(outcome, error, tiles_of(job, drawing))
            return None
        outcome.tiles = len(work.picture.plan)
        self._under_way.add(work)
        self._opened += 1
        return work

    # --- answers ----------------------------------------------------------------------------------------

    def _take(self, group: Group) -> None:
        tile = self._asked.pop(group.prompt.group_id)
        tokens = sum(len(sample.ids) for sample in group.samples)
        work = tile.work
        work.outcome.tokens += tokens
        if work in self._under_way:
            self._draw(tile, group)
        self._progress.wrote(tokens)

    def _draw(self, tile: _Tile, group: Group) -> None:
        work, index = tile.work, tile.index
        before = work.partial.pop(index, [None] * len(group.samples))
        fresh = [sample if sample.chain.well_formed else None for sample in group.samples]
        samples = [old or new for old, new in zip(before, fresh, strict=True)]
        complete = [sample for sample in samples if sample is not None]
        if len(complete) < len(samples):
            if tile.attempt + 1 < ATTEMPTS:
                work.partial[index] = samples
                work.outcome.retries += 1
                self._again.append(_Tile(work, index, tile.attempt + 1))
            else:
                why = next(s.chain.errors[0] for s in group.samples if not s.chain.well_formed)
                error = f"tile {index}: the policy wrote no complete chain in {ATTEMPTS} attempts ({why})"
                self._end(work, ImageRefused(error))
            return
        try:
            work.picture.draw(index, complete)
            self._progress.drew()
            if work.picture.complete:
                self._write(work)
                self._end(work, None)
        except Exception as error:  # as in _open
            self._end(work, error)

    def _write(self, work: _Work) -> None:
        wanted, picture, outcome = self._wanted, work.picture, work.outcome
        results = picture.results()
        kept = list(range(len(results)))
        if wanted.best is not None:
            source = output.as_rgb(picture.photograph)
            chains = [[picture.chains[tile][number] for tile in range(len(picture.plan))] for number in kept]
            images = [output.as_rgb(result) for result in results]
            outcome.scores = wanted.best(images, source, chains)
            kept = [max(kept, key=outcome.scores.__getitem__)]
            outcome.chosen = kept[0] + 1
        shown = [results[number] for number in kept]
        if wanted.save_steps:
            output.write_steps(work.job, picture, kept)
        if wanted.compare:
            output.write_strip(work.job, picture, shown)
        outcome.outputs = output.write_results(work.job, shown)  # last: it is what --skip-existing looks for

    def _end(self, work: _Work, error: Exception | None) -> None:
        self._under_way.remove(work)
        work.outcome.seconds = round(time.monotonic() - work.opened, 3)
        if error is not None:
            self._failed(work.outcome, error, len(work.picture.plan) - len(work.picture.chains))
        else:
            work.outcome.status = "restored"
            self._done(work.outcome)

    def _failed(self, outcome: Outcome, error: Exception, tiles: int) -> None:
        if os.environ.get("RL_SYSTEM_TRACEBACK") and not isinstance(error, ImageRefused):
            raise error
        said = str(error) if isinstance(error, (ImageRefused, SamplingFailed)) else f"{type(error).__name__}: {error}"
        outcome.error = said
        self._progress.dropped(tiles)
        self._done(outcome)

    def _give_up(self, reason: str) -> None:
        for work in list(self._under_way):
            self._end(work, SamplingFailed(reason))
        while self._jobs:
            job = self._jobs.popleft()
            self._failed(Outcome(str(job.source)), SamplingFailed(reason), tiles_of(job, self._wanted.drawing))


def tiles_of(job: Job, drawing: Drawing) -> int:
    """Tiles of a picture by its header; 0 if that cannot be read."""
    size = read_size(job.source)
    return 0 if size is None or 0 in size else len(drawing.plan(*size))


def _check_memory(photograph: Photograph, drawing: Drawing) -> None:
    """Refuse a picture whose result the memory cannot hold: the system would end the whole batch."""
    height, width = drawing.canvas(*photograph.size)
    canvases = drawing.samples * (len(drawing.steps) + 1)
    needed = height * width * 4 * (3 + 4 * canvases + 3 * 4)  # float32: reference, sums and weights, writing
    if needed > (free := free_memory()):
        raise ImageRefused(
            f"a result of {width}x{height} pixels needs about {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} are free"
        )
