"""Verification of a checkpoint's structure, on the synthetic one and on damaged copies of it."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from disagg_lib.checkpoint import data_set, download
from disagg_lib.checkpoint.data_set import DATA_SET, data_checks
from disagg_lib.checkpoint.structure import LLAMA_405B, REHEARSAL, verify_checkpoint
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.errors import ModelError


@pytest.fixture
def folder(tmp_path):
    return make_rehearsal_checkpoint(tmp_path / "model")


def unmet(folder, shape=REHEARSAL, max_seq_len=22016):
    return [check.requirement for check in verify_checkpoint(folder, shape, max_seq_len) if not check.ok]


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_synthetic_checkpoint_passes(folder):
    assert unmet(folder) == []


def test_a_rehearsals_checkpoint_is_not_said_to_come_from_the_hub(experiment):
    assert "nvidia/" not in download.origin(experiment(engine="rehearsal", container="none"))
    assert "nvidia/Llama" in download.origin(experiment(engine="trtllm"))


def test_it_is_not_the_real_model(folder):
    assert "num_hidden_layers: 126" in unmet(folder, LLAMA_405B)


def test_a_missing_shard_is_found(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "every shard of the index is there" in unmet(folder)


def test_a_shard_cut_short_is_found(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "safetensors headers and sizes agree" in unmet(folder)


def test_a_shard_of_another_checkpoint_is_found(folder):
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert unmet(folder) == ["every tensor of the index is in its shard"]


@pytest.mark.parametrize(
    ("values", "requirement"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures: ['LlamaForCausalLM']"),
        ({"num_attention_heads": 8}, "num_attention_heads: 2"),
        ({"max_position_embeddings": 8192}, "context length of at least 22016 tokens"),
    ],
)
def test_another_config_is_found(folder, values, requirement):
    edit(folder / "config.json", **values)
    assert unmet(folder) == [requirement]


def test_another_quantisation_is_found(folder):
    edit(folder / "hf_quant_config.json", quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    assert unmet(folder) == ["quant_algo: NVFP4"]


def test_a_tokenizer_that_does_not_load_is_found(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert unmet(folder) == ["the tokenizer loads"]


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_cannot_be_read_is_an_error_with_the_path(folder, text):
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ModelError, match="config.json: .*ownload"):
        verify_checkpoint(folder, REHEARSAL, 22016)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The harness's second folder and the data set, whole, but for prompts of 20 tokens."""
    monkeypatch.setattr(data_set, "MAX_INPUT_TOKENS", 20)
    second, data = (
        tmp_path / "models/Llama3.1-405B/Meta-Llama-3.1-405B-Instruct",
        tmp_path / "preprocessed_data/llama3.1-405b",
    )
    for folder in (second, data):
        folder.mkdir(parents=True)
    for path in (second / "config.json", second / "tokenizer.json", data / DATA_SET):
        path.write_bytes(b"x")
    np.save(data / "input_lens.npy", np.zeros(8313, np.int32))
    np.save(data / "input_ids_padded.npy", np.zeros((8313, 20), np.int32))
    return tmp_path


def test_the_harnesss_files_are_listed_with_their_digests(scratch):
    checks = data_checks(str(scratch))
    assert [check.ok for check in checks] == [True] * 5
    assert checks[0].found == f"SHA-256 {hashlib.sha256(b'x').hexdigest()}, 0.0 MB"


def test_what_is_missing_comes_with_how_to_get_it(tmp_path):
    checks = data_checks(str(tmp_path), needed=True)
    assert {(check.ok, check.found, check.level) for check in checks} == {(False, "absent", "error")}
    assert "hf download meta-llama/Llama-3.1-405B-Instruct --revision be673f32" in checks[0].fix
    assert "r2-downloader" in checks[2].fix and "preprocess_data.py" in checks[3].fix


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (np.zeros(8313, np.int64), "int64 8313, "),
        (np.zeros(5, np.int32), "int32 5, "),
        (None, "no whole array ("),
    ],
)
def test_an_array_of_another_shape_is_found(scratch, content, found):
    path = scratch / "preprocessed_data/llama3.1-405b/input_lens.npy"
    path.write_bytes(b"no array at all") if content is None else np.save(path, content)
    (check,) = [check for check in data_checks(str(scratch)) if not check.ok]
    assert check.found.startswith(found)


def test_an_array_cut_short_is_found(scratch):
    path = scratch / "preprocessed_data/llama3.1-405b/input_lens.npy"
    path.write_bytes(path.read_bytes()[:-4])
    assert [check.found[:14] for check in data_checks(str(scratch)) if not check.ok] == ["no whole array"]


def test_a_pickle_is_not_opened(scratch, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    data_checks(str(scratch), str(tmp_path / "trap.pkl"))
    assert not (tmp_path / "opened").exists()
