"""A run in a store: what arrives, in which order, who may write, and what happens when the store fails."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from rl_system.config.uris import absolute, below, is_uri
from rl_system.runs import claim as claims
from rl_system.runs import mirror as mirrors
from rl_system.runs.claim import Claim
from rl_system.runs.mirror import Mirror
from rl_system.runs.store import CLAIM, StoredRun, StoreError

pytestmark = pytest.mark.unit


class Watched(StoredRun):
    """Notes what is written; a hook may refuse it."""

    def write(self, name: str, data: bytes) -> None:
        if name not in (CLAIM, "claim.probe"):
            self.__dict__.setdefault("written", []).append(name)
            self.__dict__.get("hook", lambda _: None)(name)
        super().write(name, data)


@pytest.fixture
def stored(tmp_path) -> Watched:
    plain = StoredRun.at(f"file://{tmp_path}/store/runs/mine")
    return Watched(plain.files, plain.path, plain.uri)


@pytest.fixture
def copy(tmp_path) -> Path:
    folder = tmp_path / "copy" / "mine"
    folder.mkdir(parents=True)
    return folder


def take(stored: StoredRun, wait=lambda _: None) -> Claim:
    return Claim.take(stored, wait)


def put(path: Path, data: bytes, changed_s: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (changed_s, changed_s))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_uploaded_comes_back_byte_by_byte_and_only_changes_are_sent(tmp_path, stored, copy):
    for number in range(20):
        put(copy / f"groups/{number % 3}/{number}.png", os.urandom(1000 * number), number)
    put(copy / "config.yaml", b"seed: 0\n", 100)
    whole = hashes(copy)
    put(copy / "groups/000004.unfinished/half.png", b"half", 5)
    put(copy / "ready/.00000001.group.7.tmp", b"half", 5)
    put(copy / "checkpoints/mine/policy/model.safetensors", b"the learner writes its own", 5)
    put(copy / "start/model.safetensors", b"is made again", 5)
    (copy / "logs").mkdir()
    (copy / "logs/ray").symlink_to(tmp_path)
    mirror = Mirror(stored, copy, take(stored))
    mirror.flush()
    stored.fetch(tmp_path / "fetched")
    assert hashes(tmp_path / "fetched") == whole

    stored.written.clear()
    put(copy / "journal.jsonl", b"{}\n", 200)
    put(copy / "groups/1/1.png", b"replaced", 201)
    (copy / "groups/2/2.png").unlink()
    mirror.flush()
    assert stored.written == ["journal.jsonl", "groups/1/1.png"]
    stored.fetch(tmp_path / "again")
    whole |= {"journal.jsonl": "", "groups/1/1.png": ""}
    del whole["groups/2/2.png"]
    assert hashes(tmp_path / "again") == {name: digest for name, digest in hashes(copy).items() if name in whole}


def test_a_fetched_copy_is_not_sent_back_and_its_deletions_are(tmp_path, stored, copy):
    put(copy / "ready/00000001.group", b"stale", 1)
    put(copy / "metrics.jsonl", b"{}\n", 2)
    Mirror(stored, copy, take(stored)).close()
    assert not copy.exists()
    stored.fetch(copy)
    stored.written.clear()
    mirror = Mirror(stored, copy, take(stored), known=True)
    (copy / "ready/00000001.group").unlink()
    mirror.flush()
    assert stored.written == [] and set(stored.list()) == {"metrics.jsonl"}


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("survived", range(5))
def test_an_upload_killed_between_files_leaves_the_older_changes_and_no_status_without_the_rest(stored, copy, survived):
    order = ["config.yaml", "evaluation/before/0000_lr.png", "evaluation/before/evaluation.json", "journal.jsonl"]
    put(copy / "status.json", b'{"state": "done"}', 1)  # last, whenever it was written
    for time_s, name in enumerate(order, start=2):
        put(copy / name, name.encode(), time_s)

    def kill(name: str) -> None:
        if len(stored.written) > survived:
            raise Killed

    stored.__dict__["hook"] = kill
    with pytest.raises(Killed):
        Mirror(stored, copy, take(stored)).flush()
    assert set(stored.list()) == set(order[:survived])
    assert all(stored.read(name) == name.encode() for name in order[:survived])


def test_a_fresh_claim_is_refused_a_stale_one_is_taken_over(stored, monkeypatch):
    monkeypatch.setattr(claims, "_machine", lambda: "another")  # whose processes nobody here can see
    take(stored)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"is being written to by attempt \w{8} on .*, last heard of 0 s ago; it is free"
    ):
        take(stored)
    claim = Path(stored.path) / CLAIM
    written = claim.stat().st_mtime
    os.utime(claim, (written - claims.STALE_S - 5,) * 2)
    mine = take(stored)
    mine.renew()
    mine.release()
    assert not claim.exists() and not list(Path(stored.path).iterdir())


def test_the_claim_of_a_process_that_has_died_on_this_machine_is_taken_over_at_once(stored):
    process = multiprocessing.get_context("fork").Process(target=take, args=(stored,))
    process.start()
    process.join()
    assert process.exitcode == 0 and (Path(stored.path) / CLAIM).exists()
    take(stored)
    with pytest.raises(ValueError, match="last heard of 0 s ago"):  # this process lives
        take(stored)


def test_of_two_that_claim_at_once_the_later_writer_has_the_run(stored):
    later: list[Claim] = []

    def meanwhile(_: float) -> None:
        (Path(stored.path) / CLAIM).unlink()  # the second one had looked before there was a claim
        later.append(take(stored))

    with pytest.raises(ValueError, match="just now"):
        Claim.take(stored, meanwhile)
    later[0].renew()


def test_a_writer_whose_claim_was_taken_writes_nothing_more_and_says_so(stored, copy, monkeypatch):
    monkeypatch.setattr(mirrors, "EVERY_S", 0.01)
    ended = threading.Event()
    mirror = Mirror(stored, copy, take(stored), on_error=ended.set)
    put(copy / "journal.jsonl", b"{}\n", 1)
    mirror.flush()
    (Path(stored.path) / CLAIM).unlink()
    other = take(stored)
    put(copy / "journal.jsonl", b"{}\n{}\n", 2)
    mirror.start()
    assert ended.wait(60)
    with pytest.raises(StoreError, match="was taken over by attempt"):
        mirror.flush()
    with pytest.raises(StoreError, match="taken over"):
        mirror.close()
    assert stored.read("journal.jsonl") == b"{}\n" and (copy / "journal.jsonl").exists()
    other.renew()


def test_the_claim_is_looked_at_between_the_files_of_a_long_pass(stored, copy, monkeypatch):
    monkeypatch.setattr(mirrors, "RENEW_S", -1.0)
    mirror = Mirror(stored, copy, take(stored))
    put(copy / "a", b"a", 1)
    put(copy / "b", b"b", 2)
    stored.__dict__["hook"] = lambda name: (Path(stored.path) / CLAIM).unlink()
    with pytest.raises(StoreError, match="somebody who has removed the claim"):
        mirror.flush()
    assert set(stored.list()) == {"a"}


def test_a_failing_upload_is_logged_and_tried_again_and_in_the_end_fails_the_run(stored, copy, monkeypatch, caplog):
    monkeypatch.setattr(mirrors.time, "sleep", lambda _: None)
    failures = iter([OSError("slow down"), OSError("slow down")])

    def fail(name: str) -> None:
        for error in failures:
            raise error

    stored.__dict__["hook"] = fail
    mirror = Mirror(stored, copy, take(stored))
    put(copy / "journal.jsonl", b"{}\n", 1)
    mirror.flush()
    assert stored.read("journal.jsonl") == b"{}\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"{stored.uri}: not written, tried again: slow down"
    ] * 2

    def refuse(name: str) -> None:
        raise OSError("access denied")

    stored.__dict__["hook"] = refuse
    ended = threading.Event()
    monkeypatch.setattr(mirrors, "EVERY_S", 0.01)
    mirror = Mirror(stored, copy, mirror._claim, on_error=ended.set, give_up_s=0)
    put(copy / "status.json", json.dumps({"state": "done"}).encode(), 2)
    mirror.start()
    assert ended.wait(60)
    with pytest.raises(StoreError, match="could not be written to for 0 s: access denied"):
        mirror.close()
    assert (copy / "status.json").exists() and stored.status() == {}


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("foo://bucket/runs", "Unrecognized filesystem type in URI: foo://bucket/runs"),
        ("s3://bucket/runs?bogus=1", "Unexpected query parameter in S3 URI: 'bogus'"),
        ("s3://bucket?region=us-east-1", "names no folder in bucket"),
        ("file://host/runs", "Unsupported hostname"),
    ],
)
def test_a_wrong_uri_is_refused_in_one_line(uri, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        StoredRun.at(uri)
    assert said in str(refused.value) and uri in str(refused.value)


def test_uris_are_kept_and_paths_are_made_absolute():
    uri = "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http"
    assert is_uri(uri) and absolute(uri) == uri
    assert below(uri, "mine") == "s3://bucket/runs/mine?endpoint_override=127.0.0.1:9000&scheme=http"
    assert not is_uri("runs") and absolute("runs") == str(Path("runs").resolve())
    assert absolute("abfs://container@account.dfs.core.windows.net/runs").startswith("abfs://container@")
    with pytest.raises(ValueError, match=r"s3://\.\.\.@bucket/runs holds credentials"):
        absolute("s3://key:secret@bucket/runs")
