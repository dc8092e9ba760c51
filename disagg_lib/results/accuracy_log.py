"""accuracy.txt, and LoadGen's accuracy log."""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .logs import NAN, LogError, read_bytes


@dataclass(frozen=True)
class AccuracyScores:
    """What the evaluation wrote into accuracy.txt. `scores` are its own names and units; hash is of the whole log."""

    scores: Mapping[str, float]
    sha256: str

    def get(self, name: str) -> float:
        """A score by name, NaN if the evaluation has none of that name."""
        return self.scores.get(name, NAN)


def read_accuracy_txt(path: Path | str) -> AccuracyScores:
    """Read accuracy.txt: a Python dict on one line (not JSON), then `hash=` and a SHA-256; either line end.

    Other models write `name=value` pairs or JSON; those are read too.

    Raises
    ------
    LogError : missing_file, or bad_accuracy when no score can be found in it.
    """
    text = read_bytes(path, "Evaluate the accuracy log first.").decode("utf-8", "replace")
    scores: dict[str, float] = {}
    for line in text.splitlines():
        scores.update(_scores_of(line.strip()))
    found = re.search(r"^hash=([0-9a-f]{64})", text, re.MULTILINE)
    if not scores:
        needed = "a line such as {'rougeL': 21.9, 'exact_match': 90.1, ...}"
        todo = "The evaluation failed: read its log, then evaluate again."
        raise LogError("bad_accuracy", Path(path), f"{len(text)} characters without a score", needed, todo)
    return AccuracyScores(scores, found[1] if found else "")


_QUOTED = re.compile(r"""['"]([\w-]+)['"]:\s*(?:np\.\w+\()?['"]?(-?[\d.]+(?:[eE][+-]?\d+)?)""")
_PLAIN = re.compile(r"([A-Za-z][\w-]*)\s*[=:]\s*([\d.]+)")


def _scores_of(line: str) -> dict[str, float]:
    """Scores on one line of accuracy.txt: a dict, whole or in part, wherever it stands; else `name=value` pairs.

    numpy's own repr, `np.float64(44.4)`, is no literal, and llama2-70b writes some scores as text.
    """
    pairs = [] if line.startswith("hash=") else _QUOTED.findall(line) or _PLAIN.findall(line)
    scores = {}
    for name, value in pairs:
        with contextlib.suppress(ValueError):  # 1.2.3 is a version
            scores[name] = float(value)
    return scores


def is_truncated(raw: bytes) -> bool:
    """Whether an accuracy log is only head and tail, as MLCommons' truncation leaves it."""
    return b"\n\n...\n\n" in raw or b"\r\n...\r\n" in raw


def whole_log_digest(path: Path) -> str:
    """SHA-256 of an accuracy log; "" if it is absent or truncated, so that the whole one's cannot be known."""
    raw = path.read_bytes() if path.is_file() else b""
    return "" if not raw or is_truncated(raw) else hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class AccuracyLog:
    """mlperf_log_accuracy.json as arrays: answer i has ids[offsets[i]:offsets[i + 1]]."""

    qsl_idx: np.ndarray  # (answers,) int64, in completion order
    offsets: np.ndarray  # (answers + 1,) int64
    ids: np.ndarray  # (tokens,) int32 or int64
    token_count: np.ndarray  # (answers,) int64; -1 where LoadGen wrote none
    truncated: bool  # only head and tail are there: whole answers alone are kept

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per answer."""
        return np.diff(self.offsets)

    def tokens(self, answer: int) -> np.ndarray:
        """Token ids of one answer."""
        return self.ids[self.offsets[answer] : self.offsets[answer + 1]]


_ANSWER = re.compile(rb'"qsl_idx"\s*:\s*(\d+),\s*"data"\s*:\s*"')
_COUNT = re.compile(rb'"token_count"\s*:\s*(\d+)')


def read_accuracy_log(path: Path | str, dtype: str | None = None) -> AccuracyLog:
    """Read the answers of an accuracy log, whole or truncated.

    Parameters
    ----------
    path : mlperf_log_accuracy.json.
    dtype : int32 or int64, the type of the ids that the system gave to LoadGen. None: found from token_count,
        else from the zero upper halves of int64 ids.

    Raises
    ------
    LogError : missing_file, cut_log (no closing bracket and not a truncated log), bad_accuracy (not hex, wrong length).

    Source: mlcommons/inference, loadgen/logging.cc (LogAccuracy: upper-case hex of the raw bytes).
    """
    path = Path(path)
    raw = read_bytes(path, "Copy it from the accuracy run.")
    truncated = is_truncated(raw)
    if not truncated and not raw.rstrip().endswith(b"]"):
        raise LogError("cut_log", path, "no closing `]`")
    qsl_idx, counts, data = _scan_answers(raw, truncated)
    del raw
    dtype = dtype or _id_type(data, counts)
    digits = 2 * np.dtype(dtype).itemsize
    sizes = np.array([len(part) for part in data], dtype=np.int64)
    if np.any(sizes % digits):
        answer = int(np.argmax(sizes % digits != 0))
        found = f"{sizes[answer]} hex digits for sample {qsl_idx[answer]}"
        todo = "Give the type of the ids that the system wrote (int32 for llama3.1-405b)."
        raise LogError("bad_accuracy", path, found, f"a multiple of {digits} ({dtype} ids)", todo)
    offsets = np.concatenate([[0], np.cumsum(sizes // digits)])
    ids = np.empty(int(offsets[-1]), dtype=np.dtype(dtype).newbyteorder("<"))
    for answer, part in enumerate(data):
        try:
            words = np.frombuffer(binascii.unhexlify(part), dtype=ids.dtype)
        except ValueError as error:
            raise LogError("bad_accuracy", path, f"{error} in sample {qsl_idx[answer]}") from error
        ids[offsets[answer] : offsets[answer + 1]] = words
    return AccuracyLog(np.array(qsl_idx, np.int64), offsets, ids, np.array(counts, np.int64), truncated)


def _scan_answers(raw: bytes, truncated: bool) -> tuple[list[int], list[int], list[bytes]]:
    """Sample indices, token counts (-1 without) and hex texts of all whole entries, without decoding JSON.

    One search a sample and no copy of the file: the log of 8313 long answers is 90 MB of hex.
    """
    qsl_idx, counts, data = [], [], []
    at = 0
    while found := _ANSWER.search(raw, at):
        end = raw.find(b'"', found.end())
        close = raw.find(b"}", end) if end >= 0 else -1
        if close < 0:
            break
        cut = raw.find(b"...", found.end(), end) if truncated else -1
        if cut >= 0:  # the answer in which the file was truncated
            at = cut
            continue
        at = close + 1
        count = _COUNT.search(raw, end, close)
        qsl_idx.append(int(found[1]))
        counts.append(int(count[1]) if count else -1)
        data.append(raw[found.end() : end])
    return qsl_idx, counts, data


def _id_type(data: list[bytes], counts: list[int]) -> str:
    """int32 or int64, from the token counts; without any, from the zero upper halves that int64 ids have."""
    for part, count in zip(data, counts, strict=True):
        if count > 0 and part:
            return "int64" if len(part) == 16 * count else "int32"
    sample = next((part for part in data if part), b"")
    if len(sample) % 16:
        return "int32"
    words = np.frombuffer(binascii.unhexlify(sample), dtype="<i4")
    return "int64" if words.size and not words[1::2].any() else "int32"
