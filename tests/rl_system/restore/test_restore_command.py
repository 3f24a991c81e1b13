"""``rl-system restore`` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from actors.decoding import PURE, Decoding
from actors.spec import RolloutSpec
from reward_servers.contract import Judgement, Measurement
from rl_system.commands.main import main
from rl_system.studies.restore import experts, sampling
from rl_system.studies.restore.policy import find_checkpoint
from rl_system.studies.restore.tiles import TilePlan
from tests.rl_system.restore.standin import StandInSampler

REALSR = Path(os.environ.get("REALSR", "/work/shared/data/realsr"))
TOY = Path("toy/weights/policy").resolve()
VQ = TOY.parent / "vq"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(data.cat()[60:76, 100:116]).save(path)
    return path


def restore(source, output, *more, checkpoint=TOY, backend="transformers") -> int:
    given = ["--input", str(source), "--output", str(output), "--checkpoint", str(checkpoint), "--backend", backend]
    return main(["restore", *given, *more])


def refused(capsys, *args, **options) -> str:
    assert restore(*args, **options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "rl-system restore: " in lines[-1]
    return lines[-1]


@pytest.mark.unit
def test_what_cannot_be_is_refused_in_one_line_before_anything_starts(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "TransformersSampler", None)
    out = tmp_path / "out"
    assert "there is no nothing.png" in refused(capsys, "nothing.png", out)
    assert "neither a policy" in refused(capsys, photo, out, checkpoint=tmp_path)
    assert "N is 1" in refused(capsys, photo, out, "--best", "likelihood")
    assert "there are agreement, likelihood, qwen_vl, NIQE" in refused(
        capsys, photo, out, "--samples", "2", "--best", "PSNR"
    )
    assert "musiq_koniq" in refused(capsys, photo, out, "--samples", "2", "--best", "MUSIQ", "--weights", str(tmp_path))
    assert "16 to 256" in refused(capsys, photo, out, "--tile", "300")
    assert "more than half" in refused(capsys, photo, out, "--tile-overlap", "40")
    assert "not a number from 1 to 16" in refused(capsys, photo, out, "--upscale", "0.5")
    assert "not a positive number" in refused(capsys, photo, out, "--temperature", "nan")
    assert "not a whole number from 1" in refused(capsys, photo, out, "--batch", "0")
    assert "not a number from 0" in refused(capsys, photo, out, "--guidance", "-1")
    assert "not a whole number from 1" in refused(capsys, photo, out, "--image-top-k", "some")
    assert "--guidance is not in vLLM" in refused(capsys, photo, out, "--guidance", "0.8", backend="vllm")
    assert "would overwrite an input" in refused(capsys, photo, tmp_path)
    assert "<|image|> exactly once" in refused(capsys, photo, out, "--instruction", "restore")
    assert "no image tokenizer at" in refused(capsys, photo, out, "--image-tokenizer", str(tmp_path))
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, photo, tmp_path / "file" / "out")
    assert not out.exists() and main(["restore", "--help"]) == 0


@pytest.mark.unit
def test_a_run_says_what_goes_with_its_policy(tmp_path):
    run = tmp_path / "renamed"
    policy = run / "checkpoints/name/policy"
    policy.mkdir(parents=True)
    config = f"policy:\n  image_tokenizer: {VQ}\n  instruction: 'better: <|image|>'\nrollout:\n  temperature: 0.8\n"
    (run / "config.yaml").write_text(config)
    with pytest.raises(ValueError, match="has no trained policy yet"):
        find_checkpoint(run, None, None)
    (policy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weights"):
        find_checkpoint(run, None, None)
    (policy / "model.safetensors").touch()
    for given in (run, policy):
        found = find_checkpoint(given, None, None)
        assert found.policy == policy and found.image_tokenizer == VQ
        assert (found.instruction, found.temperature) == ("better: <|image|>", 0.8)
    assert find_checkpoint(run, None, "other <|image|>").instruction == "other <|image|>"
    cold_start = f"policy:\n  image_tokenizer: {VQ}\ndata: {tmp_path}/data\nevaluation:\n  temperature: 0.7\n"
    (run / "config.yaml").write_text(cold_start)
    with pytest.raises(ValueError, match="say --instruction"):
        find_checkpoint(run, None, None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/config.yaml").write_text("instruction: 'colder: <|image|>'\n")
    found = find_checkpoint(run, None, None)
    assert (found.instruction, found.temperature) == ("colder: <|image|>", 0.7)
    shipped = find_checkpoint(TOY, None, None)
    assert shipped.image_tokenizer.samefile(VQ) and shipped.instruction == "Restore step by step: <|image|>"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text("{}")
    (alone / "model.safetensors").touch()
    with pytest.raises(ValueError, match="say --image-tokenizer DIR"):
        find_checkpoint(alone, None, None)
    with pytest.raises(ValueError, match="say --instruction"):
        find_checkpoint(alone, VQ, None)


@pytest.mark.unit
def test_metrics_choose_by_their_own_direction(monkeypatch):
    class FakeIqa:
        def __init__(self, config):
            self.name = config.metrics[0]

        def measure(self, requests):
            return [Measurement({self.name: tuple(float(image.mean()) for image in images)}) for images, _ in requests]

    monkeypatch.setattr(experts, "Iqa", FakeIqa)
    dark, bright = (np.full((4, 4, 3), value, np.uint8) for value in (10, 200))
    for name, best in (("MUSIQ", bright), ("NIQE", dark)):
        score = experts.expert(name, 2, None, None, "cpu", 1)
        scores = score([dark, bright], dark, [])
        assert len(scores) == 2 and (dark, bright)[int(np.argmax(scores))] is best


@pytest.mark.unit
def test_the_visual_expert_chooses_among_all_results_at_once(photo, tmp_path, capsys, monkeypatch):
    """Server and the way there are tested in tests/reward_servers (test_qwen_vl, test_http_routes)."""
    choice = ("--samples", "2", "--best", "qwen_vl")
    assert "say --reward-url" in refused(capsys, photo, tmp_path / "out", *choice)
    monkeypatch.delenv("RL_REWARD_TOKEN", raising=False)
    assert "RL_REWARD_TOKEN" in refused(capsys, photo, tmp_path / "out", *choice, "--reward-url", "http://127.0.0.1:9")
    monkeypatch.setenv("RL_REWARD_TOKEN", "a-token-of-the-tests")
    said = refused(capsys, photo, tmp_path / "out", *choice, "--reward-url", "http://127.0.0.1:9")
    assert "--best qwen_vl: http://127.0.0.1:9/qwen_vl/ready cannot be reached" in said
    asked, closed = [], []

    class Transport:
        def __init__(self, url, token):
            assert (url, token) == ("http://here", "a-token-of-the-tests")

        async def call(self, server, method, arguments):
            asked.append(f"{server}/{method}")
            if method == "ready":
                return {"max_images": 2}
            if len(arguments["images"]) > 2:
                raise ValueError("a group must have 1 to 2 images")
            return [Judgement(5.0, 5.0, 10 - image.mean() / 25.5) for image in arguments["images"]]

        async def close(self):
            closed.append(self)

    monkeypatch.setattr(experts, "HttpTransport", Transport)
    score = experts.expert("qwen_vl", 2, None, "http://here", "cpu", 1)
    with pytest.raises(ValueError, match=r"--best qwen_vl: http://here compares at most 2 images .*--samples is 3"):
        experts.expert("qwen_vl", 3, None, "http://here", "cpu", 1)
    dark, bright = (np.full((4, 4, 3), value, np.uint8) for value in (51, 204))
    assert score([bright, dark], bright[:2, :2], []) == pytest.approx([0.7 * 0.5 + 0.3 * 0.2, 0.7 * 0.5 + 0.3 * 0.8])
    with pytest.raises(experts.ExpertFailed, match="1 to 2 images"):
        score([dark] * 3, dark, [])
    assert asked == ["qwen_vl/ready"] * 2 + ["qwen_vl/judge"] * 2 and len(closed) == 4


@pytest.mark.unit
def test_the_log_of_a_batch_and_its_exit_code(photo, tmp_path, capsys, monkeypatch):
    """With a stand-in for the sampler: what is printed where, and how a failed picture ends the command."""
    specs: list[RolloutSpec] = []
    decodings: list[Decoding] = []

    def start(spec, device, decoding):
        specs.append(spec)
        decodings.append(decoding)
        return StandInSampler(spec.group_size)

    monkeypatch.setattr(sampling, "TransformersSampler", start)
    (tmp_path / "broken.png").write_text("text")
    (tmp_path / "notes.txt").touch()
    out, more = tmp_path / "out", ("--samples", "2", "--best", "likelihood", "--seed", "7", "--json")
    decoded = ("--guidance", "0.8", "--image-top-k", "dynamic", "--text-top-k", "1", "--temperature", "0.9")
    assert restore(tmp_path, out, *more, *decoded) == 1
    assert decodings == [PURE]
    printed = capsys.readouterr()
    broken, restored, summary = map(json.loads, printed.out.splitlines())
    assert (broken["status"], broken["error"]) == ("failed", "is not an image")
    assert restored["output_size"] == [64, 64] and restored["chosen"] == 1 and len(restored["scores"]) == 2
    assert summary["summary"]["restored"] == summary["summary"]["failed"] == 1
    assert summary["summary"]["ignored"] == [str(tmp_path / "notes.txt")]
    assert f"failed:\n  {tmp_path}/broken.png: is not an image\n" in printed.err
    assert "1 in the input are no pictures by their names" in printed.err
    with Image.open(out / "photo.png") as result:
        assert result.size == (64, 64)
    assert len(specs) == 1 and (specs[0].group_size, specs[0].seed, specs[0].max_num_seqs) == (2, 7, 32)
    assert restore(photo, out, *more[:4], "--skip-existing", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["status"] == "skipped" and len(specs) == 1


def seams(picture: np.ndarray, plan: TilePlan) -> tuple[float, float]:
    """Mean difference of neighbouring pixels across the edges of tiles, over both axes: over that of all others, and
    over the largest such mean 1 to 3 pixels beside the edges."""
    steps = [np.abs(np.diff(picture.astype(float), axis=axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)]
    edges = [
        np.array(sorted({e - 1 for s in starts for e in (s, s + plan.side) if 0 < e < length}))
        for starts, length in ((plan.rows, plan.height), (plan.columns, plan.width))
    ]
    beside = {k: np.mean([s[e + k].mean() for s, e in zip(steps, edges, strict=True)]) for k in range(-3, 4)}
    across = beside.pop(0)
    others = np.concatenate([np.delete(s, e) for s, e in zip(steps, edges, strict=True)]).mean()
    return float(across / others), float(across / max(beside.values()))


def low_resolution() -> Image.Image:
    """128x128: the first RealSR pair's LR image, or a photograph of scikit-image where the pairs are not here."""
    if REALSR.is_dir():
        return Image.open(min((REALSR / "test_LR").glob("*.png"))).convert("RGB")
    return Image.fromarray(data.cat()).resize((128, 128), Image.Resampling.BICUBIC)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_vllm_restores_128_to_512_in_tiles_without_seams(photo, tmp_path, capsys):
    """The real thing, one engine for the batch: toy policy, toy image tokenizer, vLLM."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    lr = low_resolution()
    lr.save(folder / "a photo.png")
    small = Image.open(photo)
    small.putalpha(128)
    small.save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    assert restore(folder, out, "--save-steps", "--compare", "--json", backend="vllm") == 1
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [r["status"] for r in records[:-1]] == ["failed", "restored", "restored"]
    result = np.asarray(Image.open(out / "a photo.png"))
    assert result.shape == (512, 512, 3)
    assert np.asarray(Image.open(out / "small.png")).shape == (64, 64, 4)

    plan = TilePlan.of(512, 512, 64, 16)
    large = next(record for record in records if record.get("tiles") == len(plan))
    assert large["tokens"] > len(plan) * 100 and records[-1]["summary"]["tokens_per_s"] > 0
    assert all(np.array(seams(result, plan)) < (1.2, 1.1))
    band = np.searchsorted(plan.rows[1:], np.arange(512), side="right")  # by its tile: a chequered board
    brighter = (band[:, None] + band) % 2
    assert all(np.array(seams(result + 16.0 * brighter[..., None], plan)) > (1.3, 1.2))  # of 16 grey levels
    bicubic = np.asarray(lr.resize((512, 512), Image.Resampling.BICUBIC)).astype(float)
    difference = result - bicubic
    assert 1 < np.abs(difference).mean() < 40  # drawn anew, in the picture's own colours
    assert np.abs(difference.mean(axis=(0, 1))).max() < 2

    chains = json.loads((out / "steps/a photo/chains.json").read_text())["tiles"]
    assert len(chains) == len(plan) and all(tile["chains"][0]["coarse"] for tile in chains)
    sizes = [Image.open(out / p).size for p in ("steps/a photo/coarse.png", "steps/a photo/middle.png")]
    assert sizes == [(128, 128), (256, 256)] and Image.open(out / "compare/a photo.png").size == (1028, 512)


@pytest.mark.engine
def test_transformers_restores_without_vllm_with_guidance_and_top_k(photo, tmp_path):
    decoded = ("--guidance", "0.8", "--image-top-k", "dynamic", "--text-top-k", "1")
    assert restore(photo, tmp_path / "out", "--samples", "2", "--seed", "1", *decoded) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"out/photo_{number}.png")) for number in (1, 2))
    assert first.shape == (64, 64, 3) and (first != second).any()
    bicubic = np.asarray(Image.open(photo).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    assert 1 < np.abs(first - bicubic).mean() < 40
