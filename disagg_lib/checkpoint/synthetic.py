"""The checkpoint of a rehearsal: whole in structure, two layers, 4 MB, and one that transformers loads."""

import json
import math
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from ..errors import ModelError
from .structure import ARCHITECTURE, BYTES, QUANTISATION, REHEARSAL, tensors_of

SYNTHETIC = "disagg_lib rehearsal"  # producer, in a rehearsal's hf_quant_config.json

# Llama 3.1's own: 128000 words, then 256 special tokens, those that have a name and reserved ones.
WORDS, CONTEXT_TOKENS = 128000, 131072
NAMED = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
NAMED |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
ENDS = {"bos_token_id": WORDS, "eos_token_id": [WORDS + 1, WORDS + 8, WORDS + 9]}
CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": CONTEXT_TOKENS,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "clean_up_tokenization_spaces": True,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": CONTEXT_TOKENS,
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",  # Dynamo wants one
}


def _shard(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The tensors as zeros."""
    lengths = {name: BYTES[dtype] * math.prod(shape) for name, dtype, shape in tensors}
    zeros = np.zeros(max(lengths.values()), np.uint8)
    specs = {}
    for name, dtype, shape in tensors:
        place = {"data_ptr": zeros.ctypes.data, "data_len": lengths[name]}
        specs[name] = safetensors.TensorSpec(dtype=dtype, shape=list(shape), **place)
    return safetensors.serialize(specs, {"format": "pt"})


def _tokenizer() -> bytes:
    """The stand-in's answers are words t0, t1, ...: each is the token of its number, so text and ids say the same."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reserved = iter(range(256))
    names = (NAMED.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    begin = TOKENIZER_CONFIG["bos_token"]
    ids = [(begin, ENDS["bos_token_id"])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
    return tokenizer.to_str().encode()


def _files() -> dict[str, bytes]:
    """Every file, the same each time. The one that says whose checkpoint this is comes first."""
    tensors, weight_map, shards = list(tensors_of(REHEARSAL)), {}, {}
    middle = len(tensors) // 2
    for number, part in enumerate((tensors[:middle], tensors[middle:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        shards[name] = _shard(part)
        weight_map |= dict.fromkeys((tensor for tensor, _, _ in part), name)
    total = sum(BYTES[dtype] * math.prod(shape) for _, dtype, shape in tensors)
    quantization = QUANTISATION | {"group_size": 16}
    values = {
        "hf_quant_config.json": {"producer": {"name": SYNTHETIC}, "quantization": quantization},
        "config.json": ARCHITECTURE | CONFIG | REHEARSAL | ENDS,
        "generation_config.json": {"do_sample": True, "temperature": 0.6, "top_p": 0.9} | ENDS,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
    }
    texts = {name: f"{json.dumps(value, indent=1)}\n".encode() for name, value in values.items()}
    return texts | {"tokenizer.json": _tokenizer()} | shards


def is_synthetic(folder: Path) -> bool:
    """Whether a rehearsal's checkpoint lies in the folder."""
    path = folder / "hf_quant_config.json"
    return path.is_file() and SYNTHETIC in path.read_text(errors="replace")


def make_rehearsal_checkpoint(folder: Path) -> Path:
    """Make the folder hold a valid two-layer checkpoint of zeros; files that are right already stay untouched.

    It has the real one's file and tensor names, so `verify_checkpoint` reads both alike.

    Raises
    ------
    ModelError : the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not is_synthetic(folder):  # in this order: another process may be writing its first file
        found = "found a checkpoint that is no rehearsal's"
        raise ModelError(f"{folder}: {found}. Set scratch_dir (or model_dir) to another folder")
    for name, content in _files().items():
        path, draft = folder / name, folder / f".{name}.{uuid.uuid4().hex}"
        if not path.is_file() or path.read_bytes() != content:
            draft.write_bytes(content)
            draft.replace(path)
    return folder
