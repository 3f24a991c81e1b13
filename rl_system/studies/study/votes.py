"""The votes of a study in one SQLite file: a row a vote, durable when the participant sees the next picture."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rl_system.studies.evaluate.images import EvaluationRefused
from rl_system.studies.study.material import Material

APPLICATION_ID = 0x52535631  # marks the file as ours: "RSV1"
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is mistaken for another
_CODE_LENGTH = 10
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
CREATE TABLE study (seed INTEGER NOT NULL);
CREATE TABLE method (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE image (
    id INTEGER PRIMARY KEY, data_set TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, UNIQUE (data_set, name)
);
CREATE TABLE participant (code TEXT PRIMARY KEY, started REAL NOT NULL);
CREATE TABLE vote (
    participant TEXT NOT NULL REFERENCES participant (code),
    image INTEGER NOT NULL REFERENCES image (id),
    method INTEGER NOT NULL REFERENCES method (id),
    cast REAL NOT NULL,
    PRIMARY KEY (participant, image)
);
"""


@dataclass(frozen=True)
class Tally:
    """Votes of one data set: method -> number, in the order of the study."""

    data_set: str
    images: int
    votes: dict[str, int]


class VoteBook:
    """The file of one study, open for voting; one call at a time, from any thread. Times are seconds since 1970.

    Args:
        path: of the file; made if it does not exist.
        material: what is compared; a file that exists must have been made for the same.
        seed: of the order; None takes the file's, or a random one for a new file.

    Raises:
        EvaluationRefused: the file holds something else, or another study.
    """

    def __init__(self, path: Path, material: Material, seed: int | None) -> None:
        self._db = _connect(path, "rwc")
        with _as_refusal(path):
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # in WAL mode the default may lose votes with the power
            self._db.execute("PRAGMA foreign_keys = ON")
            if not self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                _create(self._db, material, secrets.randbits(32) if seed is None else seed)
            _check_ours(self._db, path)
            _check_same(self._db, path, material, seed)
            self.seed: int = self._db.execute("SELECT seed FROM study").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def new_participant(self) -> str:
        """Code of a participant who was not there before."""
        code = "".join(secrets.choice(_LETTERS) for _ in range(_CODE_LENGTH))
        with self._db:
            self._db.execute("INSERT INTO participant VALUES (?, ?)", (code, time.time()))
        return code

    def is_participant(self, code: str) -> bool:
        """Whether the code was given out."""
        return self._db.execute("SELECT 1 FROM participant WHERE code = ?", (code,)).fetchone() is not None

    def votes(self, code: str) -> list[tuple[int, int]]:
        """Item and method of each vote of a participant, the latest last."""
        query = "SELECT image, method FROM vote WHERE participant = ? ORDER BY rowid"
        return list(self._db.execute(query, (code,)))

    def cast(self, code: str, item: int, method: int) -> None:
        """Store a vote; an earlier one on the same item is gone."""
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO vote VALUES (?, ?, ?, ?)", (code, item, method, time.time()))

    def take_back(self, code: str, item: int) -> bool:
        """Delete a vote; whether there was one."""
        with self._db:
            deleted = self._db.execute("DELETE FROM vote WHERE participant = ? AND image = ?", (code, item))
        return deleted.rowcount > 0


def tallies(path: Path) -> tuple[list[Tally], Counter[int]]:
    """Count what a file holds, also while a server writes to it.

    Returns:
        a tally per data set; number of votes -> number of participants who cast so many, those with none left out.

    Raises:
        EvaluationRefused: it is no file of a study.
    """
    if not path.is_file():
        raise EvaluationRefused(f"there is no file {path}")
    db = _connect(path, "ro")
    try:
        with _as_refusal(path):
            _check_ours(db, path)
            methods = [name for (name,) in db.execute("SELECT name FROM method ORDER BY id")]
            found = []
            images = "SELECT data_set, count(*) FROM image GROUP BY data_set ORDER BY min(id)"
            for data_set, count in db.execute(images).fetchall():
                query = (
                    "SELECT method.name, count(*) FROM vote JOIN image ON image.id = vote.image "
                    "JOIN method ON method.id = vote.method WHERE data_set = ? GROUP BY method.id"
                )
                votes = dict(db.execute(query, (data_set,)))
                found.append(Tally(data_set, count, {name: votes.get(name, 0) for name in methods}))
            each = db.execute("SELECT count(*) FROM vote GROUP BY participant")
            return found, Counter(number for (number,) in each)
    finally:
        db.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=5, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise EvaluationRefused(f"cannot open {path}: {error}") from error


def _create(db: sqlite3.Connection, material: Material, seed: int) -> None:
    with db:
        db.executescript(f"BEGIN; {_SCHEMA}")
        db.execute("INSERT INTO study VALUES (?)", (seed,))
        db.executemany("INSERT INTO method VALUES (?, ?)", enumerate(material.methods))
        images = zip(material.items, material.digests, strict=True)
        rows = [(i, item.data_set, item.name, digest) for i, (item, digest) in enumerate(images)]
        db.executemany("INSERT INTO image VALUES (?, ?, ?, ?)", rows)


def _check_ours(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise EvaluationRefused(f"{path} is no file of a study's votes")


def _check_same(db: sqlite3.Connection, path: Path, material: Material, seed: int | None) -> None:
    """Votes must not be counted for pictures that nobody saw."""
    methods = tuple(name for (name,) in db.execute("SELECT name FROM method ORDER BY id"))
    if methods != material.methods:
        raise EvaluationRefused(
            f"{path} is the study of {', '.join(methods)}, in this order, not of {', '.join(material.methods)}"
        )
    stored = [tuple(row) for row in db.execute("SELECT data_set, name, sha256 FROM image ORDER BY id")]
    given = [(i.data_set, i.name, d) for i, d in zip(material.items, material.digests, strict=True)]
    if stored != given:
        other = next(f"{row[0]}/{row[1]}" for row in [*given, *stored] if row not in stored or row not in given)
        raise EvaluationRefused(f"{path} is a study of other images than those given; {other} is one that differs")
    kept = db.execute("SELECT seed FROM study").fetchone()[0]
    if seed is not None and seed != kept:
        raise EvaluationRefused(f"{path} was begun with seed {kept}, not {seed}; leave --seed out to go on")


@contextmanager
def _as_refusal(path: Path) -> Iterator[None]:
    """A file that SQLite cannot read as a database is bad input."""
    try:
        yield
    except sqlite3.OperationalError:  # locked, disk full: not the file's fault
        raise
    except sqlite3.DatabaseError as error:
        raise EvaluationRefused(f"{path} is no file of a study's votes: {error}") from error
