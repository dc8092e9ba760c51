"""Accuracy of a run: rougeL, exact_match and tokens_per_sample of the answers' ids, and accuracy.txt with its hash.

Runs after the job and outside it, because the serving container lacks the scorer (extra `accuracy`). It computes what
the reference evaluation of llama3.1-405b computes, on the same ids, including where that is odd:

- rouge samples: F-measure of rougeL with stemming, in percent.
- niah_em samples: UUIDs of answer and reference, in order; each pair scores the share of the reference's *characters*
  that occur in the answer's UUID; the sum is divided by the number of UUIDs in the answer.
- qa_em samples: the text after the last "Answer: ". Right if it is part of the reference as it stands (so an empty answer is
  right), or if one of the reference's alternatives, divided by "|", is part of it without blanks and case.
- rougeL is the mean over rouge samples, exact_match over the other two kinds together; the first answer of a sample counts.
- Answers are stripped and cut into sentences, which changes only gen_len (characters; nothing judges it) and, in rare
  cases, the first rule of qa_em. That needs NLTK's punkt_tab data; without it answers stay whole and `notes` says so.

Source: mlcommons/inference, language/llama3.1-405b/evaluate-accuracy.py (facts of it; the code is ours).
"""

import functools
import hashlib
import json
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from disagg_lib.errors import DisaggError
from disagg_lib.mlperf_logs import read_accuracy_log

END_TOKEN = 128009  # of Llama 3
UUID = re.compile(r"\w{8}-\w{4}-\w{4}-\w{4}-\w{12}")
# transformers applies these to decoded text if tokenizer_config.json says clean_up_tokenization_spaces.
CLEAN_UPS = [(" " + mark, mark) for mark in (".", "?", "!", ",")]
CLEAN_UPS += [(" ' ", "'"), *((" " + mark, mark) for mark in ("n't", "'m", "'s", "'ve", "'re"))]


class EvaluationError(DisaggError):
    """An accuracy run that cannot be evaluated: what is missing and where it comes from."""


@functools.cache
def _rouge_scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EvaluationError(f"{error}: install the extra `accuracy` (rouge-score)") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge(reference: str, answer: str) -> float:
    """F-measure of rougeL, percent."""
    return 100 * _rouge_scorer().score(reference, answer)["rougeL"].fmeasure


def niah_em(reference: str, answer: str) -> float:
    """Needle in a haystack: agreement of UUIDs, percent, two decimals."""
    wanted, found = UUID.findall(reference), UUID.findall(answer)
    if not found:
        return 0.0
    shares = [
        sum(char.lower() in uuid.lower() for char in one) / len(one)
        for uuid, one in zip(found, wanted, strict=False)
    ]
    return round(sum(shares) / len(found) * 100, 2)


def qa_em(reference: str, answer: str) -> float:
    """Question answering: 100 if the answer holds one of the alternatives, else 0."""
    text = answer.rpartition("Answer: ")[2]
    if text in reference:
        return 100.0
    bare = re.sub(r"\s+", "", text).lower()
    return 100.0 * any(re.sub(r"\s+", "", part).lower() in bare for part in reference.split("|"))


METRICS: dict[str, Callable[[str, str], float]] = {"rouge": rouge, "niah_em": niah_em, "qa_em": qa_em}


def score(item: tuple[str, str, str]) -> float:
    """One sample's score, percent: (metric, reference, answer)."""
    metric, reference, answer = item
    return METRICS[metric](reference, answer)


def sentence_splitter() -> tuple[Callable[[str], str], str]:
    """Return (text -> stripped text with a line for each sentence, a note on how)."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        why = "answers not cut into sentences (no NLTK punkt_tab data): gen_len may differ by blanks"
        return str.strip, why
    return lambda text: "\n".join(nltk.sent_tokenize(text.strip())), "sentences cut with NLTK punkt_tab"


def load_decoder(tokenizer_dir: Path) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Return a function: lists of ids -> texts without special tokens, as transformers' batch_decode gives them."""
    from tokenizers import Tokenizer

    path = Path(tokenizer_dir) / "tokenizer.json"
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; needed is the model's tokenizer (a model directory)")
    tokenizer = Tokenizer.from_file(str(path))
    config = path.with_name("tokenizer_config.json")
    tidy = config.is_file() and json.loads(config.read_text()).get("clean_up_tokenization_spaces", False)

    def decode(answers):
        texts = tokenizer.decode_batch([list(map(int, ids)) for ids in answers], skip_special_tokens=True)
        pairs = CLEAN_UPS if tidy else ()
        return [functools.reduce(lambda text, pair: text.replace(*pair), pairs, text) for text in texts]

    return decode


def evaluate_answers(
    answers: Sequence[Sequence[int]],
    references: Sequence[str],
    metrics: Sequence[str],
    decode: Callable[[Sequence[Sequence[int]]], list[str]],
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Score answers (token ids) against their references.

    Returns
    -------
    dict: rougeL, exact_match (percent; absent if no sample has such a metric), gen_len (characters), gen_num,
    gen_tok_len, tokens_per_sample (one decimal), as the reference evaluation names them.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise EvaluationError(f"metric {', '.join(unknown)}: known are {', '.join(METRICS)}")
    split, _ = sentence_splitter()
    texts = [split(text) for text in decode(answers)]
    items = list(zip(metrics, map(split, references), texts, strict=True))
    scores = np.empty(len(items))
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for done, value in enumerate(pool.map(score, items, chunksize=32)):
                scores[done] = value
                if progress:
                    progress(done + 1, len(items))
    except BrokenProcessPool:
        fix = "Run it again where there is more memory"
        raise EvaluationError(f"a scoring process was killed. {fix}") from None
    is_rouge = np.array([metric == "rouge" for metric in metrics])
    result = {}
    for name, chosen in (("rougeL", is_rouge), ("exact_match", ~is_rouge)):
        if chosen.any():
            result[name] = float(scores[chosen].mean())
    return {**result, "gen_len": sum(map(len, texts)), **token_counts(answers)}


def token_counts(answers: Sequence[Sequence[int]]) -> dict:
    """gen_num, gen_tok_len and tokens_per_sample (one decimal) of answers' ids."""
    tokens = sum(map(len, answers))
    mean = round(tokens / len(answers), 1)
    return {"gen_num": len(answers), "gen_tok_len": tokens, "tokens_per_sample": mean}


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


def verify_test06(run_dir: Path) -> dict[str, str]:
    """Judge the TEST06 run of a run folder and write verify_accuracy.txt beside its log; {} if there is none.

    The rules: a first token that was reported by itself is the answer's first (Offline reports none); an answer ends
    with one end token or none; as many tokens were counted as there are.

    Source: mlcommons/inference, compliance/TEST06 (its verification compares the end token's number as text unless it
    is left at 2, so its word on Llama 3 is always True; here 128009 counts).
    """
    path = Path(run_dir) / "mlperf" / "test06" / "mlperf_log_accuracy.json"
    if not path.is_file():
        return {}
    try:
        answers = json.loads(path.read_text())
        ids = [np.frombuffer(bytes.fromhex(answer["data"]), "<i4") for answer in answers]
        first = [np.frombuffer(bytes.fromhex(answer.get("token_data", "")), "<i4") for answer in answers]
        counts = [answer["token_count"] for answer in answers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"not a whole log of answers ({type(error).__name__}: {error})"
        raise EvaluationError(f"{path}: {found}. Did the TEST06 run end? If not, run it again") from None
    if not answers:
        raise EvaluationError(f"{path}: no answers; did the TEST06 run end?")
    empty = sum(not len(tokens) for tokens in ids)
    if empty:
        found = f"{empty} of {len(ids)} samples have no answer, which TEST06's own rules do not see"
        raise EvaluationError(f"{path}: {found}: requests failed. Run it again")
    told = [i for i, tokens in enumerate(first) if len(tokens)]
    checks = {
        "First token check": all(ids[i][: len(first[i])].tolist() == first[i].tolist() for i in told)
        if told
        else "Skipped",
        "EOS check": not any((tokens[-2:] == END_TOKEN).sum() == 2 for tokens in ids),
        "Sample length check": list(map(len, ids)) == counts,
    }
    lines = [f"{name} pass: {word}\n" for name, word in checks.items()]
    if False not in checks.values():
        lines.append("TEST06 verification complete\n")
    path.with_name("verify_accuracy.txt").write_text("".join(lines))
    return {f"TEST06, {name}": str(word) for name, word in checks.items()}


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
    ids = [answers[index] for index in order]
    tables = Path(run_dir) / "tables"
    tables.mkdir(exist_ok=True)
    if data_set is None:
        notes = ["no reference outputs (synthetic data set): rougeL and exact_match do not exist"]
        result = token_counts(ids)
    else:
        if tokenizer_dir is None:
            raise EvaluationError("a data set with references needs tokenizer_dir (the model directory)")
        frame = read_references(Path(data_set), sha256, trust)
        if order[-1] >= len(frame):
            raise EvaluationError(f"{data_set}: {len(frame)} samples, but the log answers sample {order[-1]}")
        chosen = frame.iloc[order]
        for column in ("gt_output", "metric"):
            for index, value in zip(order, chosen[column], strict=True):
                if not isinstance(value, str):
                    raise EvaluationError(
                        f"{data_set}: sample {index}: {column} is {value!r}, needed is text"
                    )
        told = list(chosen["gt_output"]), list(chosen["metric"])
        result = evaluate_answers(ids, *told, load_decoder(tokenizer_dir), processes, progress)
        notes = [sentence_splitter()[1]]
        if {"rougeL", "exact_match"} <= set(result):
            write_accuracy_txt(result, log_path, log_path.with_name("accuracy.txt"))
    settings = Path(run_dir) / "job" / "settings.json"
    asked = json.loads(settings.read_text())["client"]["accuracy_sample_count"] if settings.exists() else 0
    asked = max(asked, len(frame) if data_set else 0)
    if len(order) < asked:
        notes.append(f"{len(order)} of {asked} samples")
    result = {**result, **test06, "notes": notes + odd + unjudged}
    (tables / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


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
