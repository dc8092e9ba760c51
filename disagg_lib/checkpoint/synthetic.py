"""The checkpoint of a rehearsal: whole in structure, two layers, a few MB."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
from tokenizers import Tokenizer, models, pre_tokenizers

from ..errors import ModelError
from .structure import ARCHITECTURE, BYTES, QUANTISATION, REHEARSAL, tensors_of

SYNTHETIC = "disagg_lib rehearsal"  # producer, in a rehearsal's hf_quant_config.json


def _write_zeros(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Write a shard; returns the bytes of its tensors."""
    lengths = {name: BYTES[dtype] * math.prod(shape) for name, dtype, shape in tensors}
    zeros = np.zeros(max(lengths.values()), np.uint8)
    specs = {}
    for name, dtype, shape in tensors:
        place = {"data_ptr": zeros.ctypes.data, "data_len": lengths[name]}
        specs[name] = safetensors.TensorSpec(dtype=dtype, shape=list(shape), **place)
    path.write_bytes(safetensors.serialize(specs, {"format": "pt"}))
    return sum(lengths.values())


def is_synthetic(folder: Path) -> bool:
    """Whether a rehearsal's checkpoint lies in the folder."""
    path = folder / "hf_quant_config.json"
    return path.is_file() and SYNTHETIC in path.read_text(errors="replace")


def make_rehearsal_checkpoint(folder: Path) -> Path:
    """Write a valid two-layer checkpoint of zeros (about 200 kB) unless the folder is there already.

    It has the real one's file and tensor names, so `verify_checkpoint` reads both alike.
    """
    if folder.exists():
        if not is_synthetic(folder):
            found = "found a checkpoint that is no rehearsal's"
            raise ModelError(f"{folder}: {found}. Set scratch_dir (or model_dir) to another folder")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        tensors, weight_map, total = list(tensors_of(REHEARSAL)), {}, 0
        middle = len(tensors) // 2
        for number, part in enumerate((tensors[:middle], tensors[middle:]), start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            total += _write_zeros(draft / name, part)
            weight_map |= dict.fromkeys((tensor for tensor, _, _ in part), name)
        quantization = {"quantization": QUANTISATION | {"group_size": 16}}
        for name, value in {
            "config.json": ARCHITECTURE | REHEARSAL | {"max_position_embeddings": 131072},
            "hf_quant_config.json": {"producer": {"name": SYNTHETIC}} | quantization,
            "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        }.items():
            (draft / name).write_text(json.dumps(value, indent=1) + "\n")
        vocabulary = {bytes([i]).decode("latin-1"): i for i in range(REHEARSAL["vocab_size"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(draft / "tokenizer.json"))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # then another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
