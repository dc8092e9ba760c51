"""The checkpoint: a small synthetic one for rehearsals, and the verification that it and the real one pass.

The layout is that of `nvidia/Llama-3.1-405B-Instruct-FP4`: config.json, hf_quant_config.json (ModelOpt NVFP4
with an FP8 KV cache), model.safetensors.index.json, shards, tokenizer.json.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from tokenizers import Tokenizer, models, pre_tokenizers

from .errors import DisaggError
from .preflight import Check

BYTES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1}  # of one element
QUANT_ALGO, KV_QUANT_ALGO = "NVFP4", "FP8"


class ModelError(DisaggError):
    """The checkpoint is absent, damaged or another one than the experiment assumes."""


@dataclass(frozen=True)
class ModelShape:
    """What config.json must say."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int


LLAMA_405B = ModelShape(126, 16384, 128, 8, 53248, 128256)
REHEARSAL = ModelShape(2, 64, 4, 2, 128, 256)


def _tensors(shape: ModelShape):
    """(name, safetensors dtype, shape) of every tensor, as ModelOpt writes NVFP4: two values a byte, one scale per 16."""
    head = shape.hidden // shape.heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (shape.kv_heads * head, shape.hidden),
        "self_attn.v_proj": (shape.kv_heads * head, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.feed_forward, shape.hidden),
        "mlp.up_proj": (shape.feed_forward, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.feed_forward),
    }
    yield "model.embed_tokens.weight", "bfloat16", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in sizes.items():
            yield f"{prefix}{name}.weight", "uint8", (rows, columns // 2)
            yield f"{prefix}{name}.weight_scale", "float8_e4m3fn", (rows, columns // 16)
            yield f"{prefix}{name}.weight_scale_2", "float32", ()
            yield f"{prefix}{name}.input_scale", "float32", ()
        yield f"{prefix}self_attn.k_proj.k_scale", "float32", ()
        yield f"{prefix}self_attn.v_proj.v_scale", "float32", ()
        yield f"{prefix}input_layernorm.weight", "bfloat16", (shape.hidden,)
        yield f"{prefix}post_attention_layernorm.weight", "bfloat16", (shape.hidden,)
    yield "model.norm.weight", "bfloat16", (shape.hidden,)
    yield "lm_head.weight", "bfloat16", (shape.vocabulary, shape.hidden)


def _write_zeros(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    zeros = np.zeros(max(BYTES[dtype] * math.prod(sizes) for _, dtype, sizes in tensors), np.uint8)
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype,
            shape=list(sizes),
            data_ptr=zeros.ctypes.data,
            data_len=BYTES[dtype] * math.prod(sizes),
        )
        for name, dtype, sizes in tensors
    }
    path.write_bytes(safetensors.serialize(specs, {"format": "pt"}))


def make_rehearsal_checkpoint(folder: Path) -> Path:
    """Write a valid two-layer checkpoint of zeros (about 200 kB) unless the folder is there already.

    It has the real one's file and tensor names, so `verify_checkpoint` reads both alike.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        shape, shards = REHEARSAL, 2
        tensors = list(_tensors(shape))
        weight_map, total = {}, 0
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]
            _write_zeros(draft / name, part)
            weight_map |= dict.fromkeys((tensor for tensor, _, _ in part), name)
            total += sum(BYTES[dtype] * math.prod(sizes) for _, dtype, sizes in part)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": shape.hidden,
            "intermediate_size": shape.feed_forward,
            "max_position_embeddings": 131072,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocabulary,
        }
        quantization = {"quant_algo": QUANT_ALGO, "kv_cache_quant_algo": KV_QUANT_ALGO, "group_size": 16}
        for name, value in (
            ("config.json", config),
            (
                "hf_quant_config.json",
                {"producer": {"name": "disagg_lib rehearsal"}, "quantization": quantization},
            ),
            ("model.safetensors.index.json", index),
        ):
            (draft / name).write_text(json.dumps(value, indent=1) + "\n")
        vocabulary = {bytes([i]).decode("latin-1"): i for i in range(shape.vocabulary)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(draft / "tokenizer.json"))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft)
        raise
    return folder


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: not there. Needed: a complete checkpoint; run 01_model_download") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON ({error}). Download this file again") from None
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: found a {type(value).__name__}, needed a mapping. Download this file again"
        )
    return value


def _check_shards(folder: Path) -> list[Check]:
    weight_map = _read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    checks = [
        Check(
            "every shard of the index is there",
            f"{len(shards) - len(absent)} of {len(shards)}" + (f"; absent: {absent[0]}" if absent else ""),
            bool(shards) and not absent,
            "run 01_model_download again: it fetches what is absent",
        )
    ]
    damaged, held = [], set()
    for name in shards:
        if name in absent:
            continue
        try:
            with safetensors.safe_open(folder / name, framework="numpy") as file:
                held |= set(file.keys())
        except safetensors.SafetensorError as error:
            damaged.append(f"{name}: {error}")
    checks.append(
        Check(
            "safetensors headers and sizes agree",
            damaged[0] if damaged else f"{len(shards) - len(absent)} shards read",
            not damaged,
            "delete the named shard and run 01_model_download again",
        )
    )
    lost = sorted(set(weight_map) - held)
    checks.append(
        Check(
            "every tensor of the index is in its shard",
            f"{len(weight_map) - len(lost)} of {len(weight_map)}" + (f"; absent: {lost[0]}" if lost else ""),
            bool(weight_map) and not lost,
            "index and shards are of different revisions: download one revision whole",
        )
    )
    return checks


def verify_checkpoint(folder: Path, shape: ModelShape, max_seq_len: int) -> list[Check]:
    """Whether the folder is the checkpoint that the experiment assumes; one row a requirement.

    Raises
    ------
    ModelError : the folder, config.json or the index is absent or unreadable.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: not there. Needed: the checkpoint; run 01_model_download, or set model_dir"
        )
    config = _read_json(folder / "config.json")
    quantization = _read_json(folder / "hf_quant_config.json").get("quantization", {})
    checks = _check_shards(folder)
    fix = "this is another model: set model_dir or hf_repo"
    for key, needed in (
        ("architectures", ["LlamaForCausalLM"]),
        ("num_hidden_layers", shape.layers),
        ("hidden_size", shape.hidden),
        ("num_attention_heads", shape.heads),
        ("num_key_value_heads", shape.kv_heads),
        ("intermediate_size", shape.feed_forward),
        ("vocab_size", shape.vocabulary),
    ):
        checks.append(Check(f"{key}: {needed}", str(config.get(key)), config.get(key) == needed, fix))
    for key, needed in (("quant_algo", QUANT_ALGO), ("kv_cache_quant_algo", KV_QUANT_ALGO)):
        checks.append(
            Check(f"{key}: {needed}", str(quantization.get(key)), quantization.get(key) == needed, fix)
        )
    length = config.get("max_position_embeddings", 0)
    checks.append(
        Check(
            f"context length of at least {max_seq_len} tokens",
            str(length),
            length >= max_seq_len,
            "lower max_seq_len",
        )
    )
    try:
        found, ok = f"{Tokenizer.from_file(str(folder / 'tokenizer.json')).get_vocab_size()} tokens", True
    except Exception as error:  # the tokenizers library raises bare Exception
        found, ok = str(error), False
    checks.append(Check("the tokenizer loads", found, ok, "download tokenizer.json again"))
    return checks
