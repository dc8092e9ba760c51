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
import json
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from ..errors import EvaluationError

END_TOKEN = 128009  # of Llama 3
UUID = re.compile(r"\w{8}-\w{4}-\w{4}-\w{4}-\w{12}")
# transformers applies these to decoded text if tokenizer_config.json says clean_up_tokenization_spaces.
CLEAN_UPS = [(" " + mark, mark) for mark in (".", "?", "!", ",")]
CLEAN_UPS += [(" ' ", "'"), *((" " + mark, mark) for mark in ("n't", "'m", "'s", "'ve", "'re"))]


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
