"""Accuracy of a run, after the job and outside it: its answers scored, accuracy.txt with its hash."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import EvaluationError
from .accuracy_log import read_accuracy_log
from .scoring import evaluate_answers, load_decoder, sentence_splitter, token_counts
from .test06 import verify_test06


def first_answers(log_path: Path) -> tuple[dict[int, np.ndarray], list[str]]:
    """Return {sample index: ids} of an accuracy log, and notes on it; the first answer of a sample counts."""
    log = read_accuracy_log(log_path, "int32")
    if log.truncated:
        raise EvaluationError(f"{log_path}: truncated for a submission; evaluate the log that LoadGen wrote")
    answers: dict[int, np.ndarray] = {}
    for place, index in enumerate(log.qsl_idx.tolist()):
        answers.setdefault(index, log.tokens(place))
    if not answers:
        raise EvaluationError(f"{log_path}: no answers; is this an accuracy run?")
    empty = sorted(index for index, ids in answers.items() if not len(ids))
    if empty:
        found = f"{len(empty)} samples have no answer (first: {empty[0]})"
        raise EvaluationError(f"{log_path}: {found}: requests failed, the run is INVALID")
    unreal = next((index for index, ids in answers.items() if ids.min() < 0), None)
    if unreal is not None:
        raise EvaluationError(
            f"{log_path}: sample {unreal} has the id {answers[unreal].min()}, which is no token"
        )
    told = log.token_count >= 0
    other = told & (log.lengths != log.token_count)
    if told.any() and (log.lengths == 2 * log.token_count)[told].all():
        fix = "Needed are int32 ids; run the accuracy test again with them"
        raise EvaluationError(f"{log_path}: two int32 a counted token, so its ids are int64. {fix}")
    if not other.any():
        return answers, []
    first = int(np.argmax(other))
    found = f"{log.lengths[first]} ids, token_count {log.token_count[first]}"
    return answers, [
        f"ids and token_count differ in {other.sum()} answers (sample {log.qsl_idx[first]}: {found})"
    ]


def write_accuracy_txt(result: dict, log_path: Path, path: Path) -> Path:
    """Write accuracy.txt as the checker reads it: the results as a dict, then the hash of the whole accuracy log."""
    digest = hashlib.sha256(Path(log_path).read_bytes()).hexdigest()
    names = ("rougeL", "exact_match", "gen_len", "gen_num", "gen_tok_len", "tokens_per_sample")
    ordered = {name: result[name] for name in names}
    path.write_text(f"\nResults\n\n{ordered!r}\nhash={digest}\n")
    return path


def evaluate(
    run_dir: Path,
    data_set: Path | None = None,
    tokenizer_dir: Path | None = None,
    sha256: str | None = None,
    trust: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Evaluate the accuracy run of a run folder; write tables/accuracy.json and, with all scores, accuracy.txt beside the log.

    A TEST06 run is judged on the way.

    Parameters
    ----------
    data_set : MLPerf's pickle (columns gt_output, metric), opened only if its sha256 is given and right or `trust`.
        None, as for synthetic prompts: there are no references, so only the token counts are computed.
    tokenizer_dir : folder with tokenizer.json of the model; needed with data_set.

    Returns
    -------
    the scores, and `notes`: what was not or not exactly computed.

    Raises
    ------
    EvaluationError, LogError : nothing is written then.
    """
    log_path = Path(run_dir) / "mlperf" / "accuracy" / "mlperf_log_accuracy.json"
    test06, unjudged = {}, []
    try:
        test06 = verify_test06(run_dir)
    except EvaluationError as error:
        if not log_path.exists():
            raise
        unjudged = [f"TEST06 is not judged: {error}"]
    if test06 and not log_path.exists():
        return {**test06, "notes": ["no accuracy run"]}
    answers, odd = first_answers(log_path)
    order = sorted(answers)
    ids, asked = [answers[index] for index in order], _asked(run_dir)
    if data_set is None:
        notes = ["no reference outputs (synthetic data set): rougeL and exact_match do not exist"]
        result = token_counts(ids)
    else:
        if tokenizer_dir is None:
            raise EvaluationError("a data set with references needs tokenizer_dir (the model directory)")
        frame = read_references(Path(data_set), sha256, trust)
        told, asked = _told(frame, order, data_set), max(asked, len(frame))
        result = evaluate_answers(ids, *told, load_decoder(tokenizer_dir), processes, progress)
        notes = [sentence_splitter()[1]]
        if {"rougeL", "exact_match"} <= set(result):
            write_accuracy_txt(result, log_path, log_path.with_name("accuracy.txt"))
    if len(order) < asked:
        notes.append(f"{len(order)} of {asked} samples")
    result = {**result, **test06, "notes": notes + odd + unjudged}
    tables = Path(run_dir) / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _asked(run_dir: Path) -> int:
    """Samples that the accuracy run was asked for; 0 if nobody said."""
    settings = Path(run_dir) / "job" / "settings.json"
    return json.loads(settings.read_text())["client"]["accuracy_sample_count"] if settings.exists() else 0


def _told(frame, order: list[int], data_set: Path) -> tuple[list[str], list[str]]:
    """References and metrics of the samples that were answered."""
    if order[-1] >= len(frame):
        raise EvaluationError(f"{data_set}: {len(frame)} samples, but the log answers sample {order[-1]}")
    chosen = frame.iloc[order]
    for column in ("gt_output", "metric"):
        for index, value in zip(order, chosen[column], strict=True):
            if not isinstance(value, str):
                raise EvaluationError(f"{data_set}: sample {index}: {column} is {value!r}, needed is text")
    return list(chosen["gt_output"]), list(chosen["metric"])


def read_references(path: Path, sha256: str | None, trust: bool):
    """Return MLPerf's data set as a DataFrame; a pickle runs code, so only if it is known or trusted."""
    import pandas as pd

    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 and found != sha256.lower():
            raise EvaluationError(f"{path}: sha256 is {found}, needed is {sha256}: another or a damaged file")
        if not sha256 and trust is not True:
            why = f"not opened, because a pickle runs code when it is read. Its sha256 is {found}"
            raise EvaluationError(f"{path}: {why}: give it if you know this file, or set trust_dataset: true")
        file.seek(0)
        frame = pd.read_pickle(file, compression=None)
    missing = {"gt_output", "metric"} - set(frame.columns)
    if missing:
        found = ", ".join(frame.columns)
        raise EvaluationError(f"{path}: no column {', '.join(sorted(missing))}; found {found}")
    return frame
