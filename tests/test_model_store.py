"""Verification of a checkpoint's structure, on the synthetic one and on damaged copies of it."""

import json
import shutil

import pytest

from disagg_lib.model_store import (
    LLAMA_405B,
    REHEARSAL,
    ModelError,
    make_rehearsal_checkpoint,
    verify_checkpoint,
)


@pytest.fixture
def folder(tmp_path):
    return make_rehearsal_checkpoint(tmp_path / "model")


def unmet(folder, shape=REHEARSAL, max_seq_len=22016):
    return [check.requirement for check in verify_checkpoint(folder, shape, max_seq_len) if not check.ok]


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_synthetic_checkpoint_passes(folder):
    assert unmet(folder) == []


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
        ({"num_attention_heads": 8}, "num_attention_heads: 4"),
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
