"""What a learner sees of the rest of the system. Implementations travel into the workers by pickle.

Weights leave through :class:`vlcot.weights.WeightSink`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlcot.groups import ScoredGroup

if TYPE_CHECKING:  # they import torch; the experience queue's process, which needs only these classes, does not
    from pyarrow.fs import FileSystem

    from learners.spec import LearnerSpec
    from vlcot.weights import WeightSink


class BatchSource(Protocol):
    """Where batches come from. Every rank asks for itself."""

    def next_batch(self, step: int) -> list[ScoredGroup] | None:
        """The groups of ``step`` (1, 2, ...); blocks until there are enough. None: there will be no more.

        Every rank gets the same list for the same step. After a failure the group goes on behind its last
        checkpoint and asks again for the steps after it: they must give the same lists again, until
        :meth:`ProgressSink.checkpointed` says that they are no longer needed.
        """


@dataclass(frozen=True)
class LearnerStart:
    """What a group that has just come up says of itself.

    Attributes:
        step: steps done, also the version of its weights; 0 in a fresh run.
        checksums: XXH3 per tensor of these weights, by name.
        engines: versions of deepspeed, torch and ray as imported in the worker.
    """

    step: int
    checksums: Mapping[str, int]
    engines: Mapping[str, str]


class ProgressSink(Protocol):
    """Whom rank 0 tells how far it is."""

    def started(self, start: LearnerStart) -> None:
        """The group is up. After a restart (``start.step`` > 0) the receivers serve its weights or later ones."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is trained and version ``step`` of the weights is served: its slots may be released."""

    def checkpointing(self, step: int) -> None:
        """A checkpoint that contains ``step`` is about to be written. Returns once all that a run needs, besides the
        checkpoint, to go on from it is stored."""

    def checkpointed(self, step: int) -> None:
        """A checkpoint that contains ``step`` is committed."""


@dataclass(frozen=True)
class LoopConfig:
    """Arguments of :func:`learners.loop.train_loop`. ``export_path`` is where the trained policy goes, in the pyarrow
    file system ``export_files`` if there is one."""

    spec: LearnerSpec
    source: BatchSource
    sink: WeightSink
    progress: ProgressSink
    export_path: str
    export_files: FileSystem | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """A question and its answer.

    Attributes:
        prompt: int32 [P] ids, without loss.
        answer: int32 [A] ids of the VLCoT with the turn end.
    """

    prompt: np.ndarray
    answer: np.ndarray


class ExampleSource(Protocol):
    """Where supervised examples come from. Every rank asks for itself and gets the same."""

    def examples(self, step: int) -> list[Example]:
        """The batch of ``step`` (1, 2, ...): the same whenever it is asked for."""

    def held_out(self) -> list[Example]:
        """Examples that no step has."""


class SupervisedLine(ProgressSink, Protocol):
    """Whom the ranks of a cold start tell how far they are, and ask whether it is to end early."""

    def goes_on(self, step: int) -> bool:
        """Whether ``step`` is to be made: the same answer for every rank."""


@dataclass(frozen=True)
class SupervisedConfig:
    """Arguments of :func:`learners.supervised_loop.supervised_loop`.

    Attributes:
        spec: of the group; ``groups_per_step`` examples a step, no reference.
        dropout: of what attention and MLP add to the residual stream.
        z_loss: coefficient of the squared log-sum-exp.
        evaluate_every: steps between held-out losses; the last step always has one.
        export_path, export_files: of :class:`LoopConfig`.
    """

    spec: LearnerSpec
    source: ExampleSource
    line: SupervisedLine
    dropout: float
    z_loss: float
    evaluate_every: int
    export_path: str
    export_files: FileSystem | None = None
