"""What a checkpoint must hold: tensors, shards, sizes; checked without reading the weights."""

import json
from collections.abc import Collection
from pathlib import Path

import safetensors
from tokenizers import Tokenizer

from ..checks import Check
from ..errors import ModelError

BYTES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1}  # of one element
# What config.json and hf_quant_config.json must say.
ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}
QUANTISATION = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("intermediate_size", "vocab_size")
LLAMA_405B = dict(zip(SIZES, (126, 16384, 128, 8, 53248, 128256), strict=True))
# The real vocabulary, and so few dimensions that its two matrices take 2 MB.
REHEARSAL = dict(zip(SIZES, (2, 4, 2, 1, 16, 128256), strict=True))


def tensors_of(sizes: dict[str, int]):
    """(name, safetensors dtype, shape) of every tensor, as ModelOpt writes NVFP4: two values a byte, one scale per 16."""
    layers, hidden, heads, kv_heads, feed_forward, vocabulary = sizes.values()
    keys = kv_heads * hidden // heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    yield "model.embed_tokens.weight", "bfloat16", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in matrices.items():
            yield f"{prefix}{name}.weight", "uint8", (rows, columns // 2)
            yield f"{prefix}{name}.weight_scale", "float8_e4m3fn", (rows, -(-columns // 16))
            yield f"{prefix}{name}.weight_scale_2", "float32", ()
            yield f"{prefix}{name}.input_scale", "float32", ()
        yield f"{prefix}self_attn.k_proj.k_scale", "float32", ()
        yield f"{prefix}self_attn.v_proj.v_scale", "float32", ()
        yield f"{prefix}input_layernorm.weight", "bfloat16", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", "bfloat16", (hidden,)
    yield "model.norm.weight", "bfloat16", (hidden,)
    yield "lm_head.weight", "bfloat16", (vocabulary, hidden)


def read_json(path: Path, fix: str = "Download this file again") -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: not there. Needed: a complete checkpoint; run 01_model_download") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found a {type(value).__name__}, needed a mapping. {fix}")
    return value


def _shard_rows(folder: Path) -> list[tuple]:
    weight_map = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    damaged, held = [], set()
    for name in sorted(set(shards).difference(absent)):
        try:
            with safetensors.safe_open(folder / name, framework="numpy") as file:
                held |= set(file.keys())
        except safetensors.SafetensorError as error:
            damaged.append(f"{name}: {error}")
    lost = sorted(set(weight_map) - held)

    def complete(requirement: str, wanted: Collection, lacking: list[str], fix: str) -> tuple:
        found = f"{len(wanted) - len(lacking)} of {len(wanted)}"
        return requirement, "; absent: ".join([found, *lacking[:1]]), bool(wanted) and not lacking, fix

    fetch, anew = "run 01_model_download again: it fetches what is absent", "run 01_model_download again"
    header = damaged[0] if damaged else f"{len(shards) - len(absent)} shards read"
    mixed = "index and shards are of different revisions: download one revision whole"
    return [
        complete("every shard of the index is there", shards, absent, fetch),
        ("safetensors headers and sizes agree", header, not damaged, f"delete the named shard and {anew}"),
        complete("every tensor of the index is in its shard", weight_map, lost, mixed),
    ]


def require_folder(folder: Path) -> None:
    if not folder.is_dir():
        fix = "run 01_model_download, or set model_dir"
        raise ModelError(f"{folder}: not there. Needed: the checkpoint; {fix}")


def verify_checkpoint(folder: Path, sizes: dict[str, int], max_seq_len: int) -> list[Check]:
    """Whether the folder is the checkpoint that the experiment assumes; one row a requirement.

    Raises
    ------
    ModelError : the folder, config.json or the index is absent or unreadable.
    """
    require_folder(folder)
    config = read_json(folder / "config.json")
    quantization = read_json(folder / "hf_quant_config.json").get("quantization", {})
    rows, fix = _shard_rows(folder), "this is another model: set model_dir or hf_repo"
    for needed, said in ((ARCHITECTURE | sizes, config), (QUANTISATION, quantization)):
        for key, value in needed.items():
            rows.append((f"{key}: {value}", str(said.get(key)), said.get(key) == value, fix))
    enough = f"context length of at least {max_seq_len} tokens"
    length = config.get("max_position_embeddings", 0)
    rows.append((enough, str(length), length >= max_seq_len, "lower max_seq_len"))
    try:
        found, ok = f"{Tokenizer.from_file(str(folder / 'tokenizer.json')).get_vocab_size()} tokens", True
    except Exception as error:  # the tokenizers library raises bare Exception
        found, ok = str(error), False
    rows.append(("the tokenizer loads", found, ok, "download tokenizer.json again"))
    return [Check(*row) for row in rows]
