"""The benchmark's data set and the files that the harness wants beside the checkpoint."""

import shlex
from pathlib import Path

import numpy as np

from ..checks import Check
from ..files import sha256
from ..serving.lengths import MAX_INPUT_TOKENS, SAMPLE_COUNT

HARNESS_REPO = "meta-llama/Llama-3.1-405B-Instruct"
HARNESS_REVISION = "be673f326cab4cd22ccfef76109faf68e41aa5f1"  # mlcommons/inference, language/llama3.1-405b
HARNESS_FILES = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer*")
DATA_SET = "mlperf_llama3.1_405b_dataset_8313_processed_fp16_eval.pkl"


def _array_shape(path: Path) -> str:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        return f"no whole array ({error})"
    return f"{array.dtype} {' x '.join(map(str, array.shape))}"


def data_checks(scratch_dir: str, dataset_path: str | None = None, needed: bool = False) -> list[Check]:
    """The harness's second folder and the data set: what is there, its digest, and how to get it. Opens no pickle.

    Parameters
    ----------
    needed : whether the run fails without them (client: nvidia_harness); otherwise they are warnings.
    """
    # Of the original model's folder the harness wants config and tokenizer alone.
    second = Path(scratch_dir) / "models/Llama3.1-405B/Meta-Llama-3.1-405B-Instruct"
    data = Path(scratch_dir) / "preprocessed_data/llama3.1-405b"
    get_model = (
        f"accept the terms of {HARNESS_REPO}, then hf download {HARNESS_REPO} --revision {HARNESS_REVISION} "
        f"--include {' '.join(map(repr, HARNESS_FILES))} --local-dir {shlex.quote(str(second))}"
    )
    get_pickle = (
        "MLCommons' r2-downloader with https://inference.mlcommons-storage.org/metadata/llama3-1-405b-dataset-8313.uri "
        "(README of mlcommons/inference, language/llama3.1-405b)"
    )
    get_arrays = (
        "in the harness's container: python3 code/llama3_1-405b/tensorrt/preprocess_data.py --data_dir build/data "
        "--preprocessed_data_dir build/preprocessed_data"
    )
    wanted = {second / name: (get_model, "") for name in ("config.json", "tokenizer.json")}
    wanted[Path(dataset_path) if dataset_path else data / DATA_SET] = get_pickle, ""
    wanted[data / "input_ids_padded.npy"] = get_arrays, f"int32 {SAMPLE_COUNT} x {MAX_INPUT_TOKENS}"
    wanted[data / "input_lens.npy"] = get_arrays, f"int32 {SAMPLE_COUNT}"
    checks = []
    for path, (fix, shape) in wanted.items():
        found, ok = "absent", path.is_file()
        if ok:
            found = f"SHA-256 {sha256(path)}, {path.stat().st_size / 1e6:.1f} MB"
            if shape:
                there = _array_shape(path)
                ok, found = there == shape, f"{there}, {found}"
        requirement = f"{path.parent.name}/{path.name}" + (f": {shape}" if shape else "")
        checks.append(Check(requirement, found, ok, fix, level="error" if needed else "warning"))
    return checks
