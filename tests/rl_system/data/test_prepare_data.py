"""rl-system prepare-data without Ray: what a row holds, what is refused, what is kept."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reward_servers.client import RewardClient
from reward_servers.contract import Captions, DetectedObject, Detection
from rl_system.commands.main import main
from rl_system.data.prepared import PreparedData
from rl_system.data.rows import PreparedRows
from rl_system.preparation import pipeline, settings, texts
from rl_system.preparation.card import histogram
from rl_system.preparation.shards import ShardWriter
from toy.export_photographs import export
from vlcot.degradation import DegradationRecord, apply_record, describe
from vlcot.images import area_downscale
from vlcot.policy.family import Family
from vlcot.sequence import TEXT_TAGS

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    export(folder, 16, seed=0)
    return folder


def overrides(photographs: Path, folder: Path, **changes: object) -> list[str]:
    values = {
        "input": photographs / "photographs",
        "output": folder,
        "captions": photographs / "captions.jsonl",
        "objects": photographs / "captions.jsonl",
        "min_pixels": 0,
        "min_file_kib": 0,
        "images_per_shard": 6,
        "sharpen_target": "false",
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def prepare(arguments: list[str]) -> list[str]:
    """As the command, with the shards made in this process; names of those that were made."""
    config = settings.load(arguments)
    job = pipeline.begin(config)
    with job.claim:
        writer = ShardWriter(config)
        for shard in job.missing:
            writer.write(shard, job.files)
        pipeline.finish(config, job)
    return [shard.name for shard in job.missing]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def prepared(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "data"
    assert len(prepare(overrides(photographs, output))) == 3
    return output


def test_a_row_is_a_chain_that_parses_to_its_own_texts_codes_and_images(prepared: Path) -> None:
    data, builder = PreparedData(prepared), Family.from_pretrained("toy/weights/policy").builder
    data.verify()
    assert len(data) == 16
    captions = {line["image"]: line for line in map(json.loads, captions_of(prepared))}
    for index in (0, 7, 15):
        row, example = data.row(index), data.example(index)
        assert example.row_id == row["row_id"] and example.prompt_ids.dtype == example.answer_ids.dtype == np.int32
        chain = builder.parse(example.answer_ids.tolist())
        assert chain.well_formed
        said = captions[row["image"]]
        assert chain.texts == (row["degradation"], said["coarse"], said["middle"], said["fine"])
        assert row["objects"] == said["objects"]
        for codes, name in zip(chain.images, ("coarse_codes", "middle_codes", "final_codes"), strict=True):
            assert codes is not None and codes.reshape(-1).tolist() == row[name]
        target, lr = (np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("target", "lr"))
        record = DegradationRecord.from_dict(json.loads(row["record"]))
        assert (apply_record(target / np.float32(255), record) == lr).all()
        assert describe(record, settings.SEESR_TRAINING) == row["degradation"]
    assert (data.lengths() == [[len(e.prompt_ids), len(e.answer_ids)] for e in map(data.example, range(16))]).all()
    assert len(TEXT_TAGS) == 4 and sorted(data.column("row_id")) == list(range(16))


def captions_of(prepared: Path) -> list[str]:
    return (prepared.parent / "captions.jsonl").read_text().splitlines()


@pytest.fixture(autouse=True, scope="module")
def _captions_beside(prepared: Path, photographs: Path) -> None:
    (prepared.parent / "captions.jsonl").write_bytes((photographs / "captions.jsonl").read_bytes())


def test_a_killed_run_goes_on_and_leaves_equal_files(photographs: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    config = settings.load(overrides(photographs, output))
    job = pipeline.begin(config)
    ShardWriter(config).write(job.missing[1], job.files)
    (output / "shards" / ".shard-00002.parquet.1.tmp").write_bytes(b"half")
    job.claim.close()
    with pytest.raises(ValueError, match="has not ended"):
        PreparedData(output)
    assert prepare(overrides(photographs, output)) == ["shard-00000.parquet", "shard-00002.parquet"]
    assert contents(output) == contents(prepared)


def test_added_photographs_make_new_shards_only(photographs: Path, tmp_path: Path) -> None:
    output, source = tmp_path / "data", tmp_path / "photographs"
    for name in ("b/0.png", "b/1.png"):
        save(source / name, seed=len(name))
    captions = tmp_path / "captions.jsonl"
    names = ["a/new.png", "b/0.png", "b/1.png"]
    lines = [{"image": name, "coarse": "a", "middle": "b", "fine": "c"} for name in names]
    captions.write_text("\n".join(map(json.dumps, lines)))
    arguments = overrides(photographs, output, input=source, captions=captions, objects="null")
    assert len(prepare(arguments)) == 1
    before = contents(output / "shards")
    save(source / "a/new.png", seed=5)  # sorts before the others
    assert prepare(arguments) == ["shard-00001.parquet"]
    after = contents(output / "shards")
    assert {name: after[name] for name in before} == before
    assert PreparedData(output).column("image") == ["b/0.png", "b/1.png", "a/new.png"]
    assert prepare(arguments) == []
    (source / "b/0.png").unlink()
    assert main(["prepare-data", *arguments]) == 2


def save(path: Path, seed: int, side: int = 96) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_files_that_cannot_be_used_are_listed_and_not_fatal(photographs: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "photographs", tmp_path / "data"
    save(source / "good.png", 1)
    save(source / "small.png", 2, side=40)
    (source / "text.jpg").write_text("no image")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:9000])
    captions = tmp_path / "captions.jsonl"
    lines = [{"image": n, "coarse": "a", "middle": "b", "fine": "c"} for n in ("good.png", "cut.png")]
    captions.write_text("\n".join(map(json.dumps, lines)))
    prepare(overrides(photographs, output, input=source, captions=captions, objects="null", min_pixels=2500))
    listed = {e["path"]: e["reason"] for e in map(json.loads, (output / "skipped.jsonl").read_text().splitlines())}
    assert listed.keys() == {"small.png", "text.jpg", "cut.png"}
    assert "min_pixels" in listed["small.png"] and "read" in listed["cut.png"]
    manifest = PreparedData(output).manifest
    assert (manifest["images"], manifest["rows"], manifest["skipped"]) == (1, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "nowhere"}, "no such folder"),
        ({"input": "configs"}, "no photograph"),
        ({"seeed": 1}, "did you mean 'seed'"),
        ({"seed": "many"}, "many"),
        ({"captions": "null"}, "needs captions"),
        ({"captions": "qwen_vl"}, "needs url="),
        ({"degradation": "mild"}, "degradation=mild is none of"),
        ({"crop": 100}, "multiple of the policy's full size 64"),
        ({"policy": "configs"}, "policy="),
        ({"image_tokenizer": "toy/weights/policy"}, "no VQ checkpoint there"),
        ({"images_per_shard": 0}, "at least 1"),
        ({"seed": 3}, "prepared with other settings: seed=3 (was 0)"),
        ({"output": "docs"}, "is no prepared folder"),
    ],
)
def test_bad_input_ends_with_one_message(
    photographs: Path, prepared: Path, changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    if "input" in changes:
        changes = changes | {"output": prepared.parent / "never"}
    assert main(["prepare-data", *overrides(photographs, prepared, **changes)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_a_photograph_without_a_caption_is_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = (photographs / "captions.jsonl").read_text().splitlines()
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(lines[1:]))
    assert main(["prepare-data", *overrides(photographs, tmp_path / "data", captions=captions)]) == 2
    assert json.loads(lines[0])["image"] in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_degradation_of_ones_own(photographs: Path, tmp_path: Path) -> None:
    file = tmp_path / "mild.yaml"
    file.write_text("base: seesr_light\nfinal_sinc_prob: 0.0\nstage2: {jpeg_quality_range: [90, 100]}\n")
    chosen = settings.degradation(settings.load(overrides(photographs, tmp_path / "data", degradation=file)))
    assert (chosen.final_sinc_prob, chosen.stage2.jpeg_quality_range, chosen.sharpen_target) == (0.0, (90, 100), False)
    assert chosen.stage1 == settings.SEESR_LIGHT.stage1
    file.write_text("base: seesr_light\nstage2: {quality: 3}\n")
    with pytest.raises(settings.ConfigError, match=r"unknown: stage2\.quality"):
        settings.load(overrides(photographs, tmp_path / "data", degradation=file))


def test_a_crop_larger_than_the_full_size_is_averaged_down(photographs: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "one.png", 3, side=128)
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"image": "one.png", "coarse": "a", "middle": "b", "fine": "c"}))
    changes = {"input": tmp_path / "in", "captions": captions, "objects": "null", "crop": 128}
    prepare(overrides(photographs, tmp_path / "data", **changes))
    row = PreparedData(tmp_path / "data").row(0)
    whole = np.asarray(Image.open(tmp_path / "in" / "one.png"))
    whole = whole[:, ::-1] if row["flip"] else whole
    assert (np.asarray(Image.open(io.BytesIO(row["target"]))) == area_downscale(np.ascontiguousarray(whole), 64)).all()


def test_a_damaged_shard_is_found(prepared: Path, tmp_path: Path) -> None:
    for name, data in contents(prepared).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    shard = tmp_path / "shards" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100] + b"x" + shard.read_bytes()[101:])
    with pytest.raises(ValueError, match="checksum differs"):
        PreparedData(tmp_path).verify()
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001"):
        PreparedData(tmp_path)


def test_training_takes_a_prepared_folder_as_its_rows(prepared: Path) -> None:
    source = PreparedRows(str(prepared), 64, with_objects=True)
    train = {source.row(i, "train").row_id.split("#")[0] for i in range(32)}
    held = {source.row(i, "heldout").row_id.split("#")[0] for i in range(32)}
    assert len(train) + len(held) == 16 and not train & held
    row = source.row(0, "train")
    assert row.hq.shape == (64, 64, 3) and row.lr.shape == (16, 16, 3) and row.objects is not None
    with pytest.raises(ValueError, match="64 pixels a side, the policy's have 512"):
        PreparedRows(str(prepared), 512, with_objects=False)


def test_histograms_of_the_card_count_every_value_once(prepared: Path) -> None:
    assert histogram(list(range(30, 96)) * 2)["counts"] == [12] * 11
    assert histogram([1, 3, 3]) == {"edges": [0.5, 1.5, 2.5, 3.5], "counts": [1, 0, 2]}
    assert sum(histogram([0.5, 0.1, 0.7])["counts"]) == 3
    assert histogram(["b", "a", "b"]) == {"values": ["a", "b"], "counts": [1, 2]}
    card = json.loads((prepared / "card.json").read_text())
    drawn = card["histograms"]["Degradation parameters"]
    for name in ("stage 1 JPEG quality", "stage 2 noise kind", "final sinc kind", "JPEG last"):
        assert sum(drawn[name]["counts"]) == card["counts"]["rows"] == 16
    html = (prepared / "card.html").read_text()
    assert html.count('<img src="data:image/') == 8 * 5


class Servers:
    """Stands for live servers, which tests/rl_system/test_serve_rewards.py has."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    async def call(self, server: str, method: str, arguments: dict) -> object:
        if self.broken:
            raise ValueError("this picture is refused")
        side, level = arguments["image"].shape[0], int(arguments["image"].mean())
        if method == "caption":
            return Captions(f"side {side}", f"level {level}", f"asked {server}")
        return Detection((DetectedObject("cat", 0.9, (0, 0, 8, 8), 0.5),), ("cat",))

    async def close(self) -> None:
        pass


def test_servers_see_the_target_and_a_failure_leaves_no_shard(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"captions": "qwen_vl", "objects": "grounded_sam", "url": "http://servers:8000"}
    servers = Servers(broken=True)
    monkeypatch.setattr(texts, "client", lambda config: RewardClient(servers, config.server_timeout_s))
    arguments = overrides(photographs, tmp_path / "data", **changes)
    with pytest.raises(texts.ServerFailed, match="this picture is refused"):
        prepare(arguments)
    assert not list((tmp_path / "data" / "shards").iterdir())
    servers.broken = False
    prepare(arguments)
    row = PreparedData(tmp_path / "data").row(3)
    level = int(np.asarray(Image.open(io.BytesIO(row["target"]))).mean())
    assert (row["coarse"], row["middle"], row["fine"]) == ("side 64", f"level {level}", "asked qwen_vl")
    assert row["objects"] == ["cat"]


def test_servers_need_a_token(photographs: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("RL_REWARD_TOKEN", raising=False)
    changes = {"captions": "qwen_vl", "url": "http://servers:8000"}
    assert main(["prepare-data", *overrides(photographs, tmp_path / "data", **changes)]) == 2
    assert "RL_REWARD_TOKEN" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_an_image_tokenizer_of_another_family_is_refused(photographs: Path, tmp_path: Path) -> None:
    given = json.loads(Path("toy/weights/vq/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"num_embeddings": 7}))
    with pytest.raises(settings.ConfigError, match="and 7 codes, the policy's sequences have 8 and"):
        settings.load(overrides(photographs, tmp_path / "data", image_tokenizer=tmp_path))
