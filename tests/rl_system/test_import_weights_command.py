"""``rl-system import-weights`` as a user meets it: what is wrong is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl_system.commands.main import main
from tests.vlcot.weight_import import published
from vlcot.vocabulary import code_name
from vlcot.weight_import import chameleon, convert, llamagen

pytestmark = pytest.mark.unit
NORM = "model.layers.1.self_attn.k_norm.bias"


class RunsCode:
    """A pickle that runs a shell command when it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A small published policy and VQ; the command's full-size figures are those of the small family here."""
    monkeypatch.setattr(llamagen, "VQ_8", published.SMALL_VQ)
    plan = chameleon.policy_plan
    small = (published.CODEBOOK, published.LAYOUT)
    monkeypatch.setattr(chameleon, "policy_plan", lambda checkpoint, tokenizer: plan(checkpoint, tokenizer, *small))
    published.small_policy(tmp_path / "pure")
    published.small_tokenizer(tmp_path / "text_tokenizer.json")
    torch.save({"model": published.llamagen_state(published.SMALL_VQ)}, tmp_path / "vq_ds8_c2i.pt")
    return tmp_path


def policy(case, *more):
    return main(["import-weights", "policy", f"{case}/pure", *more, "--tokenizer", f"{case}/text_tokenizer.json"])


def vq(case, *more):
    return main(["import-weights", "vq8", f"{case}/vq_ds8_c2i.pt", *more])


def refused(case, capsys, run=policy) -> str:
    """The one-line message of an import that wrote nothing."""
    before = sorted(case.iterdir())
    code = run(case, f"{case}/ours")
    message = capsys.readouterr().err.strip()
    assert code == 2, message
    assert message.startswith("rl-system import-weights: ") and len(message.splitlines()) == 1
    assert sorted(case.iterdir()) == before
    return message


def shard_of(case, name):
    index = json.loads((case / "pure/model.safetensors.index.json").read_text())
    return case / "pure" / index["weight_map"][name]


def rewrite(case, change, name=NORM):
    """Change the tensors of the shard that holds ``name``, index included."""
    file = shard_of(case, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = case / "pure/model.safetensors.index.json"
    weight_map = {n: f for n, f in json.loads(index.read_text())["weight_map"].items() if f != file.name}
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(tensors, file.name)}))


def test_import_then_check_then_a_second_import_is_refused(case, capsys):
    assert policy(case, f"{case}/ours") == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {file.name for file in (case / "ours").iterdir()} == names
    assert policy(case, f"{case}/ours", "--check") == 0
    assert "sound and equal to" in capsys.readouterr().out
    assert policy(case, f"{case}/ours") == 2
    assert "exists already" in capsys.readouterr().err
    assert vq(case, f"{case}/vq") == 0 and vq(case, f"{case}/vq", "--check") == 0


def test_check_writes_nothing_and_names_the_tensor_that_differs(case, capsys):
    before = sorted(case.iterdir())
    assert policy(case, "--check") == 0 and sorted(case.iterdir()) == before
    assert policy(case, f"{case}/ours") == 0
    tensors = load_file(case / "ours/model.safetensors")
    tensors[NORM][0, 0] += 1e-3
    save_file(tensors, case / "ours/model.safetensors")
    assert policy(case, f"{case}/ours", "--check") == 2
    assert f"'{NORM}' is not what the source gives" in capsys.readouterr().err


def test_a_wrong_shape_is_refused_by_name(case, capsys):
    rewrite(case, lambda t: t.update({NORM: torch.zeros(3, 16)}))
    assert f"tensor '{NORM}' has shape [3, 16]; [1, 16] or [2, 16] needed" in refused(case, capsys)


def test_a_missing_tensor_is_refused_by_name(case, capsys):
    rewrite(case, lambda t: t.pop(NORM))
    assert f"1 missing: '{NORM}'" in refused(case, capsys)


def test_an_extra_tensor_is_refused_by_name(case, capsys):
    rewrite(case, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}))
    assert "1 not known: 'model.layers.2.mlp.up_proj.weight'" in refused(case, capsys)


def test_a_renamed_tensor_is_refused_with_both_names(case, capsys):
    rewrite(case, lambda t: t.update({NORM.replace("k_norm", "key_norm"): t.pop(NORM)}))
    message = refused(case, capsys)
    assert f"1 missing: '{NORM}'" in message and "key_norm" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused_by_name(case, capsys, value):
    rewrite(case, lambda t: t[NORM].fill_(value))
    assert f"tensor '{NORM}' holds NaN or infinite values" in refused(case, capsys)


def test_an_integer_tensor_is_refused_by_name(case, capsys):
    rewrite(case, lambda t: t.update({NORM: torch.zeros(1, 16, dtype=torch.int64)}))
    assert f"tensor '{NORM}' has dtype torch.int64" in refused(case, capsys)


def test_a_truncated_shard_is_refused_with_the_tensor_where_it_breaks_off(case, capsys):
    file = shard_of(case, NORM)
    os.truncate(file, file.stat().st_size - 4)
    message = refused(case, capsys)
    assert f"{file} is truncated: tensor '" in message


def test_a_shard_without_whole_header_is_refused_with_a_tensor_it_should_hold(case, capsys):
    file = shard_of(case, NORM)
    os.truncate(file, 100)
    assert "it should hold 'model." in refused(case, capsys)


def test_a_missing_shard_and_a_shard_elsewhere_are_refused_by_name(case, capsys):
    shard_of(case, NORM).unlink()
    assert "the shard is missing; it should hold" in refused(case, capsys)
    index = case / "pure/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "../../etc/passwd"}}))
    assert f"tensor '{NORM}' must name a file beside the index" in refused(case, capsys)


def test_an_index_that_contradicts_its_shards_is_refused_by_name(case, capsys):
    index = case / "pure/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.more": weight_map[NORM]}}))
    assert "tensor 'model.more' is missing, though the index says it is there" in refused(case, capsys)
    del weight_map[NORM]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"tensor '{NORM}' is there, but the index does not say so" in refused(case, capsys)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(case, capsys, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = case / "trace"
    state = {"encoder.conv_in.weight": RunsCode(trace)}
    torch.save({"model": state}, case / "vq_ds8_c2i.pt", _use_new_zipfile_serialization=zipped)
    message = refused(case, capsys, vq)
    assert "vq_ds8_c2i.pt is refused, nothing of it was run: it is a pickle that wants to run posix.system" in message
    assert "at 'encoder.conv_in.weight'" in message
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_shard_that_runs_code_is_refused_by_name(case, capsys):
    trace = case / "trace"
    tensors = {n: t for file in (case / "pure").glob("*.safetensors") for n, t in load_file(file).items()}
    for file in (case / "pure").glob("model*"):
        file.unlink()
    published.write_shards(case / "pure", tensors, torch_files=True)
    shard = case / "pure/pytorch_model-00002-of-00003.bin"
    torch.save(torch.load(shard, weights_only=True) | {NORM: RunsCode(trace)}, shard)
    assert f"wants to run posix.system at '{NORM}'" in refused(case, capsys)
    shard.write_bytes(pickle.dumps({NORM: RunsCode(trace)}))
    assert "pytorch_model-00002-of-00003.bin" in refused(case, capsys)
    assert not trace.exists()


def test_a_truncated_torch_file_is_refused(case, capsys):
    file = case / "vq_ds8_c2i.pt"
    os.truncate(file, file.stat().st_size // 2)
    message = refused(case, capsys, vq)
    assert "vq_ds8_c2i.pt is truncated, or no torch checkpoint (it should hold 'encoder.conv_in.weight')" in message
    file.write_bytes(b"not a checkpoint at all")
    assert "vq_ds8_c2i.pt" in refused(case, capsys, vq)
    file.write_bytes(b"")
    assert "vq_ds8_c2i.pt" in refused(case, capsys, vq)


def test_a_vq_of_the_other_kind_is_refused_by_its_tensors(case, capsys):
    code = main(["import-weights", "vq16", f"{case}/vq_ds8_c2i.pt", f"{case}/ours"])
    assert code == 2 and "missing: 'encoder.conv_blocks.2.res.0.nin_shortcut.weight'" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(case, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    before = sorted(case.iterdir())
    assert policy(case, f"{case}/ours") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(case.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop(code_name(9)), "1 missing, as 'IMGIMGJZ'"),
        (lambda v: v.update({"IMGIMGAJZ": 400}), "1 too many, as 'IMGIMGAJZ'"),  # 09, a second name of code 9
        (lambda v: v.update({code_name(9): v[code_name(8)]}), "has another name too"),
        (lambda v: v.pop("<eoss>"), "no token named <eoss>"),
        (lambda v: v.update({"text": 9_999}), "tokenizer has id 9999, but the model has only"),
        (lambda v: v.pop("<reserved08804>"), "has no grid tokens"),
    ],
)
def test_a_code_map_that_is_no_bijection_is_refused_by_the_token(case, capsys, change, said):
    file = case / "text_tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer["model"]["vocab"])
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if vocabulary.get(t["content"]) == t["id"]]
    file.write_text(json.dumps(tokenizer))
    assert said in refused(case, capsys)


def test_arguments_that_contradict_each_other_are_refused(case, capsys):
    source = f"{case}/pure"
    for arguments, said in (
        (["policy", source, f"{case}/ours"], "needs --tokenizer"),
        (["policy", source, "--tokenizer", "x"], "OUTPUT is missing"),
        (["vq8", source, f"{case}/ours", "--tokenizer", "x"], "vq8 has none"),
        (["vq9", source, f"{case}/ours"], "invalid choice: 'vq9'"),
        (["vq8", f"{case}/nowhere", f"{case}/ours"], "no weights there"),
    ):
        assert main(["import-weights", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_missing_config_is_refused(case, capsys):
    (case / "pure/config.json").unlink()
    assert "pure/config.json does not exist" in refused(case, capsys)
    shutil.rmtree(case / "pure")
    assert "no weights there" in refused(case, capsys)
