"""TEST06: first token, end token and length of each answer."""

import json
import re
from pathlib import Path

import numpy as np

from ..errors import EvaluationError
from .scoring import END_TOKEN

VERIFIED = "mlperf/test06/verify_accuracy.txt"
LINES = ("First token check pass", "EOS check pass", "Sample length check pass")


def failed_lines(text: str) -> list[str]:
    """The lines that verify_accuracy.txt lacks or that are not True (or Skipped, as Offline's first tokens)."""
    return [line for line in LINES if not re.search(rf"(?m)^{line}: (?:True|Skipped)\s*$", text)]


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
