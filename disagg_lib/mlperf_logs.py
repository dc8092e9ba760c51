"""LoadGen's files -> values: one frozen MlperfRun per log folder, units in its names.

LoadGen writes integers of ns into the detail log and the summary; figures here are ns / 1e6, which is exact to the
last digit of the integer. `MlperfRun.detail` keeps LoadGen's own values under LoadGen's own keys.
"""

from __future__ import annotations

import ast
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from .errors import DisaggError

SUMMARY, DETAIL, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
NAN = float("nan")


class LogError(DisaggError):
    """A LoadGen log is missing, cut short or contradicts itself; `case` names which.

    Cases: missing_folder, empty_folder, missing_file, not_loadgen, cut_log, mixed_runs, bad_value, bad_accuracy;
    of the files beside the logs also bad_experiment, and no_token_latencies where a figure needs them.
    """

    def __init__(self, case: str, where: Path, found: str, needed: str, todo: str) -> None:
        self.case = case
        super().__init__(f"{where}: {case.replace('_', ' ')}: found {found}; needed {needed}. {todo}")


def _percentiles(prefix: str, stem: str, suffix: str) -> list[tuple[str, tuple[str, ...], float]]:
    """Rows of FIGURES for the six percentiles that LoadGen writes."""
    written = {
        "p50": "50.00",
        "p90": "90.00",
        "p95": "95.00",
        "p97": "97.00",
        "p99": "99.00",
        "p999": "99.90",
    }
    return [
        (f"{prefix}_{name}_ms", (f"result_{stem}{key}_percentile{suffix}",), 1e6)
        for name, key in written.items()
    ]


#: field -> (detail-log keys in order of preference, divisor). Source: mlcommons/inference, loadgen/results.cc and
#: loadgen/test_settings_internal.cc, tags v4.1 to v6.0; keys seen in logs of 4.1.30, 5.0.15, 5.0.25, 5.1.0, 5.1.2 and 6.0.17.
FIGURES: dict[str, tuple[tuple[str, ...], float]] = {
    name: (keys, divisor)
    for name, keys, divisor in [
        # Server, Offline, SingleStream each have a key of their own for samples per second
        (
            "samples_per_s",
            (
                "result_completed_samples_per_sec",
                "result_samples_per_second",
                "result_qps_with_loadgen_overhead",
            ),
            1,
        ),
        ("scheduled_samples_per_s", ("result_scheduled_samples_per_sec",), 1),
        # models with inferred tokens (gptj) write only the last two
        (
            "completed_tokens_per_s",
            (
                "result_completed_tokens_per_second",
                "result_tokens_per_second",
                "result_inferred_completed_tokens_per_second",
                "result_inferred_tokens_per_second",
            ),
            1,
        ),
        # MultiStream judges whole queries: its per-query keys differ from its per-sample ones, which are kept here
        ("latency_min_ms", ("result_min_latency_ns",), 1e6),
        ("latency_mean_ms", ("result_mean_latency_ns",), 1e6),
        ("latency_max_ms", ("result_max_latency_ns",), 1e6),
        *_percentiles("latency", "", "_latency_ns"),
        ("query_latency_mean_ms", ("result_mean_query_latency_ns",), 1e6),
        ("query_latency_p99_ms", ("result_99.00_percentile_per_query_latency_ns",), 1e6),
        ("ttft_min_ms", ("result_first_token_min_latency_ns",), 1e6),
        ("ttft_mean_ms", ("result_first_token_mean_latency_ns",), 1e6),
        ("ttft_max_ms", ("result_first_token_max_latency_ns",), 1e6),
        *_percentiles("ttft", "first_token_", "_latency_ns"),
        # min, mean and max say "to", percentiles say "per", and only the latter carry the unit
        ("tpot_min_ms", ("result_time_to_output_token_min",), 1e6),
        ("tpot_mean_ms", ("result_time_to_output_token_mean",), 1e6),
        ("tpot_max_ms", ("result_time_to_output_token_max",), 1e6),
        *_percentiles("tpot", "time_per_output_token_", "_ns"),
        ("query_count", ("result_query_count",), 1),
        ("generated_query_count", ("generated_query_count",), 1),
        ("samples_per_query", ("generated_samples_per_query", "effective_samples_per_query"), 1),
        ("target_qps", ("effective_target_qps",), 1),
        ("target_latency_ms", ("effective_target_latency_ns",), 1e6),
        ("min_duration_ms", ("effective_min_duration_ms",), 1),
        ("min_query_count", ("effective_min_query_count",), 1),
        ("dataset_samples", ("qsl_reported_total_count",), 1),
        ("performance_sample_count", ("effective_performance_sample_count",), 1),
        ("ttft_limit_ms", ("requested_server_ttft_latency",), 1e6),
        ("tpot_limit_ms", ("requested_server_tpot_latency",), 1e6),
    ]
}

#: summary label -> detail key, lower case, runs of blanks made one. The summary prints what the detail log holds.
SUMMARY_LABELS: dict[str, str] = {
    "scenario": "effective_scenario",
    "mode": "effective_test_mode",
    "result is": "result_validity",
    "target_qps": "effective_target_qps",
    "min latency (ns)": "result_min_latency_ns",
    "max latency (ns)": "result_max_latency_ns",
    "mean latency (ns)": "result_mean_latency_ns",
    "min first token latency (ns)": "result_first_token_min_latency_ns",
    "max first token latency (ns)": "result_first_token_max_latency_ns",
    "mean first token latency (ns)": "result_first_token_mean_latency_ns",
    # 5.0.15 to 5.1.0 say "to", 5.1.1 and later say "per"
    **{
        f"{what} time {word} output token (ns)": f"result_time_to_output_token_{what}"
        for what in ("min", "max", "mean")
        for word in ("to", "per")
    },
    **{
        f"{p} percentile {label} (ns)": f"result_{stem}{p}_percentile{suffix}"
        for p in ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")
        for label, stem, suffix in (
            ("latency", "", "_latency_ns"),
            ("first token latency", "first_token_", "_latency_ns"),
            ("time to output token", "time_per_output_token_", "_ns"),
        )
    },
}

#: keys of many kB that no figure needs
_BULKY = frozenset(
    {"loaded_qsl_set", "loadgen_file_sha1", "loadgen_git_log_message", "loadgen_git_status_message"}
)
_MODES = {
    "PerformanceOnly": "performance",
    "AccuracyOnly": "accuracy",
    "SubmissionRun": "submission",
    "FindPeakPerformance": "find_peak",
}


@dataclass(frozen=True)
class MlperfRun:
    """One LoadGen run. A figure that this kind of run does not have is NaN, and `missing` says why."""

    log_dir: Path
    mode: str  # performance | accuracy | submission | find_peak
    loadgen_scenario: str  # LoadGen's word: Interactive is `Server` here
    loadgen_version: str
    test_datetime: str
    loadgen_valid: str  # VALID | INVALID; "" in an accuracy run, which LoadGen does not judge
    invalid_reason: str
    perf_constraints_met: bool | None
    min_duration_met: bool | None
    min_queries_met: bool | None
    early_stopping_met: bool | None
    early_stopping_ttft: str
    early_stopping_tpot: str
    use_token_latencies: bool
    equal_issue: bool  # sample_concatenate_permutation
    seeds: tuple[int | None, int | None, int | None]  # qsl, sample index, schedule
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    error_count: int
    samples_per_s: float
    scheduled_samples_per_s: float
    completed_tokens_per_s: float
    latency_min_ms: float
    latency_mean_ms: float
    latency_max_ms: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p95_ms: float
    latency_p97_ms: float
    latency_p99_ms: float
    latency_p999_ms: float
    query_latency_mean_ms: float
    query_latency_p99_ms: float
    ttft_min_ms: float
    ttft_mean_ms: float
    ttft_max_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p95_ms: float
    ttft_p97_ms: float
    ttft_p99_ms: float
    ttft_p999_ms: float
    tpot_min_ms: float
    tpot_mean_ms: float
    tpot_max_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p95_ms: float
    tpot_p97_ms: float
    tpot_p99_ms: float
    tpot_p999_ms: float
    query_count: float
    generated_query_count: float
    samples_per_query: float
    target_qps: float
    target_latency_ms: float
    min_duration_ms: float
    min_query_count: float
    dataset_samples: float
    performance_sample_count: float
    ttft_limit_ms: float  # LoadGen's own limit; NaN where it judges no token latency
    tpot_limit_ms: float
    missing: Mapping[str, str] = field(repr=False)
    detail: Mapping[str, object] = field(repr=False, compare=False)

    @property
    def duration_s(self) -> float:
        """Time over which LoadGen counted the completed samples (s); NaN without a rate."""
        samples = self.query_count * self.samples_per_query
        return samples / self.samples_per_s if self.samples_per_s else NAN


def read_run(log_dir: Path | str) -> MlperfRun:
    """Read the summary and detail log of one LoadGen run.

    Parameters
    ----------
    log_dir : folder that holds mlperf_log_summary.txt and mlperf_log_detail.txt, of LoadGen 4.1 to 6.x.

    Returns
    -------
    MlperfRun; times in ms are LoadGen's ns / 1e6, counts are floats so that NaN can say "not written".

    Raises
    ------
    LogError : missing_folder, empty_folder, missing_file, not_loadgen, cut_log, mixed_runs, bad_value.

    Source: mlcommons/inference, loadgen/results.cc and loadgen/logging.cc.
    """
    log_dir = Path(log_dir)
    detail_text, summary_text = _read_texts(log_dir)
    detail, errors, warnings = parse_detail(detail_text, log_dir / DETAIL)
    mode = _MODES.get(str(detail.get("effective_test_mode")), "")
    _refuse_cut(detail, detail_text, summary_text, mode, log_dir)
    _refuse_mixed(detail, summary_text, log_dir)
    _refuse_bad_values(detail, log_dir / DETAIL)
    figures = {name: _figure(detail, keys, divisor) for name, (keys, divisor) in FIGURES.items()}
    scenario = str(detail["effective_scenario"])
    if scenario != "Server" or not detail.get("requested_use_token_latencies"):
        figures["ttft_limit_ms"] = figures["tpot_limit_ms"] = NAN
    early = str(detail.get("early_stopping_result", ""))
    return MlperfRun(
        log_dir=log_dir,
        mode=mode,
        loadgen_scenario=scenario,
        loadgen_version=str(detail.get("loadgen_version", "")),
        test_datetime=str(detail.get("test_datetime", "")),
        loadgen_valid=str(detail.get("result_validity", "")),
        invalid_reason=str(detail.get("result_invalid_reason", "")),
        perf_constraints_met=detail.get("result_perf_constraints_met"),
        min_duration_met=detail.get("result_min_duration_met"),
        min_queries_met=detail.get("result_min_queries_met"),
        early_stopping_met=detail.get("early_stopping_met"),
        early_stopping_ttft=str(detail.get("early_stopping_ttft_result", early)),
        early_stopping_tpot=str(detail.get("early_stopping_tpot_result", early)),
        use_token_latencies=bool(detail.get("requested_use_token_latencies", False)),
        equal_issue=bool(detail.get("effective_sample_concatenate_permutation", False)),
        seeds=tuple(detail.get(f"effective_{k}_rng_seed") for k in ("qsl", "sample_index", "schedule")),
        errors=errors,
        warnings=warnings,
        # 4.1 and 5.0.15 write no num_errors: there the flagged lines are the only count
        error_count=max(int(detail.get("num_errors", 0)), len(errors), _summary_errors(summary_text)),
        missing=_why_missing(figures, mode, scenario, bool(detail.get("requested_use_token_latencies"))),
        detail=detail,
        **figures,
    )


def parse_detail(text: str, where: Path) -> tuple[dict[str, object], tuple[str, ...], tuple[str, ...]]:
    """Values by key (first one wins, as in the official parser), error texts, warning texts.

    Only the value of a line is decoded; the index lists of tens of kB are not decoded at all.
    """
    decoder = json.JSONDecoder()
    values: dict[str, object] = {}
    errors, warnings = [], []
    for line in text.splitlines():
        if not line.startswith(':::MLLOG {"key": "'):
            continue
        end = line.find('"', 18)
        key = line[18:end]
        flagged = '"is_error": true' in line[-400:] or '"is_warning": true' in line[-400:]
        if key in _BULKY or (key in values and not flagged):
            continue
        try:
            value, _ = decoder.raw_decode(line, end + 12)  # after `", "value": `
        except ValueError:
            value = line[end + 12 :]  # a message with characters that LoadGen does not escape, or the cut end
        values.setdefault(key, value)
        if flagged:
            (errors if '"is_error": true' in line[-400:] else warnings).append(str(value))
    if not values:
        raise LogError(
            "not_loadgen",
            where,
            "no line that starts with `:::MLLOG`",
            "LoadGen's detail log",
            "Give the folder that LoadGen wrote into (log_output.outdir).",
        )
    return values, tuple(errors), tuple(warnings)


def parse_summary(text: str) -> dict[str, str]:
    """`label : value` lines of a summary, labels in lower case with single blanks; the first of a label wins."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        label, colon, value = line.rpartition(":")
        if colon:
            found.setdefault(" ".join(label.lower().split()), value.strip())
    return found


def _read_texts(log_dir: Path) -> tuple[str, str]:
    """Text of the detail log and of the summary; line ends of either kind."""
    if not log_dir.is_dir():
        raise LogError(
            "missing_folder", log_dir, "no such folder", "a folder of LoadGen logs", "Check the path."
        )
    names = {entry.name for entry in log_dir.iterdir()}
    if not names:
        raise LogError(
            "empty_folder",
            log_dir,
            "no files",
            f"{DETAIL} and {SUMMARY}",
            "Did LoadGen start at all? See logs/.",
        )
    for name in (DETAIL, SUMMARY):
        if name not in names:
            others = ", ".join(sorted(names)[:5])
            raise LogError(
                "missing_file", log_dir / name, others, name, "Copy it from the machine that ran LoadGen."
            )
    texts = [(log_dir / name).read_bytes().decode("utf-8", "replace") for name in (DETAIL, SUMMARY)]
    return texts[0], texts[1]


def _version(text: object) -> tuple[int, ...]:
    """`5.0.25 @ 5232291860` -> (5, 0, 25)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text).split("@")[0]))


def _refuse_cut(detail: Mapping, detail_text: str, summary_text: str, mode: str, log_dir: Path) -> None:
    """Raise when either file ends before LoadGen had written all it writes."""
    last_line = detail_text.rstrip().rpartition("\n")[2]
    needed = ["effective_scenario", "effective_test_mode"]
    if mode == "accuracy":
        needed += ["power_end"]  # the last line of every accuracy log
    else:
        needed += ["result_validity", "result_query_count", "result_99.90_percentile_latency_ns"]
        if detail.get("effective_scenario") == "Server" and detail.get("requested_use_token_latencies"):
            needed += [f"result_{what}" for what in ("first_token_99.00_percentile_latency_ns",
                       "time_per_output_token_99.00_percentile_ns", "completed_tokens_per_second")]  # fmt: skip
        if _version(detail.get("loadgen_version")) >= (5, 0, 21):
            needed += ["num_errors"]  # the last line of every performance log since then
    absent = [key for key in needed if key not in detail]
    if absent or not last_line.endswith("}"):
        raise LogError(
            "cut_log",
            log_dir / DETAIL,
            f"an end at `{last_line[:60]}`" + (f", no `{absent[0]}`" if absent else ""),
            "LoadGen's last lines",
            "The run was killed or still runs: see logs/ and job/phases.jsonl, then run it again.",
        )
    if "ncountered" not in summary_text[-300:]:
        raise LogError(
            "cut_log",
            log_dir / SUMMARY,
            f"{len(summary_text)} characters without the closing line on errors",
            "`No errors encountered during test.` or a number of errors",
            "The run was killed while LoadGen wrote: run it again.",
        )


def _refuse_mixed(detail: Mapping, summary_text: str, log_dir: Path) -> None:
    """Raise when the summary's figures are not those of the detail log."""
    for label, value in parse_summary(summary_text).items():
        key = SUMMARY_LABELS.get(label)
        if key is None or key not in detail or not value:
            continue
        # MultiStream prints its block per query first
        key = next((k for k in _per_query(key) if k in detail), key)
        if not _same(value, detail[key]):
            raise LogError(
                "mixed_runs",
                log_dir / SUMMARY,
                f"{label} = {value}, but {DETAIL} has {key} = {detail[key]}",
                "summary and detail log of one run",
                "Copy both files again from the same run.",
            )


def _per_query(key: str) -> tuple[str, str]:
    """The names under which MultiStream keeps the same figure of whole queries."""
    return key.replace("_latency_ns", "_query_latency_ns"), key.replace(
        "_latency_ns", "_per_query_latency_ns"
    )


def _same(printed: str, value: object) -> bool:
    """Whether the summary's text and the detail log's value mean the same."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printed == str(value)
    if isinstance(value, int) and printed.isdigit():
        return int(printed) == value
    try:
        number = float(printed)
    except ValueError:
        return False
    last_digit = 10.0 ** -len(printed.partition(".")[2])  # Server's summary rounds to two decimals
    return math.isclose(number, value, rel_tol=5e-6, abs_tol=0.5000001 * last_digit if "." in printed else 0)


_FLAGS = (
    *(
        "result_perf_constraints_met",
        "result_min_duration_met",
        "result_min_queries_met",
        "early_stopping_met",
    ),
    *("requested_use_token_latencies", "effective_sample_concatenate_permutation"),
)
_NUMBERS = frozenset(key for keys, _ in FIGURES.values() for key in keys) | {
    *("num_errors", "effective_target_latency_percentile"),
    *(f"effective_{seed}_rng_seed" for seed in ("qsl", "sample_index", "schedule")),
}


def _refuse_bad_values(detail: Mapping, where: Path) -> None:
    """Raise when a key holds something else than LoadGen writes there: a damaged or an edited log."""
    for key, value in detail.items():
        number = key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float))
        flag = key in _FLAGS and not isinstance(value, bool)
        if number or flag or (key in _NUMBERS and not math.isfinite(value)):
            raise LogError(
                "bad_value",
                where,
                f"{key} = {str(value)[:60]}",
                "true or false" if flag else "a number",
                "The file is damaged or was edited: copy it again from the run.",
            )


def _figure(detail: Mapping, keys: tuple[str, ...], divisor: float) -> float:
    """The first key that the log has, as float; NaN without any."""
    for key in keys:
        if key in detail:
            return float(detail[key]) if divisor == 1 else detail[key] / divisor
    return NAN


def _summary_errors(text: str) -> int:
    """N of `N ERROR(S) encountered`, else 0."""
    found = re.search(r"^(\d+) ERROR", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _why_missing(figures: Mapping, mode: str, scenario: str, token_latencies: bool) -> dict[str, str]:
    """Field -> reason, for every figure that is NaN."""

    def reason(name: str) -> str:
        if mode == "accuracy":
            return "an accuracy run has no performance figures"
        if name.startswith(("ttft", "tpot")):
            if scenario != "Server":
                return f"LoadGen writes no token latencies in {scenario}"
            if not token_latencies:
                return "the run was made without use_token_latencies"
        return f"LoadGen does not write it in {scenario}"

    return {name: reason(name) for name, value in figures.items() if math.isnan(value)}


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
    path = Path(path)
    if not path.is_file():
        raise LogError(
            "missing_file", path, "no such file", "accuracy.txt", "Evaluate the accuracy log first."
        )
    text = path.read_bytes().decode("utf-8", "replace")
    scores: dict[str, float] = {}
    for line in text.splitlines():
        scores.update(_scores_of(line.strip()))
    found = re.search(r"^hash=([0-9a-f]{64})", text, re.MULTILINE)
    if not scores:
        raise LogError(
            "bad_accuracy",
            path,
            f"{len(text)} characters without a score",
            "a line such as {'rougeL': 21.9, 'exact_match': 90.1, ...}",
            "The evaluation failed: read its log, then evaluate again.",
        )
    return AccuracyScores(scores, found[1] if found else "")


def _scores_of(line: str) -> dict[str, float]:
    """Scores on one line of accuracy.txt."""
    pairs: dict[str, object] = {}
    if line.startswith("{"):
        try:
            pairs = ast.literal_eval(line)
        except (ValueError, SyntaxError):
            # numpy's own repr, `np.float64(44.4)`, is no literal
            pairs = dict(re.findall(r"""['"]([\w-]+)['"]:\s*(?:np\.\w+\()?['"]?([\d.eE+-]+)""", line))
    elif not line.startswith("hash="):
        pairs = dict(re.findall(r"([A-Za-z][\w-]*)\s*[=:]\s*([\d.]+)", line))
    scores = {}
    for name, value in pairs.items() if isinstance(pairs, dict) else ():
        try:
            scores[str(name)] = float(value)  # llama2-70b writes some scores as text
        except (TypeError, ValueError):
            continue
    return scores


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


_ENTRY = re.compile(rb'"qsl_idx"\s*:\s*(\d+),\s*"data"\s*:\s*"')
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
    if not path.is_file():
        raise LogError("missing_file", path, "no such file", ACCURACY, "Copy it from the accuracy run.")
    raw = path.read_bytes()
    truncated = b"\n\n...\n\n" in raw or b"\r\n...\r\n" in raw
    if not truncated and not raw.rstrip().endswith(b"]"):
        raise LogError(
            "cut_log", path, "no closing `]`", "a finished accuracy log", "The run was killed: run it again."
        )
    qsl_idx, counts, data = _scan_answers(raw, truncated)
    del raw
    if dtype is None:
        dtype = _id_type(data, counts)
    width = np.dtype(dtype).itemsize
    sizes = np.array([len(part) for part in data], dtype=np.int64)
    if np.any(sizes % (2 * width)):
        answer = int(np.argmax(sizes % (2 * width) != 0))
        raise LogError(
            "bad_accuracy",
            path,
            f"{sizes[answer]} hex digits for sample {qsl_idx[answer]}",
            f"a multiple of {2 * width} ({dtype} ids)",
            "Give the type of the ids that the system wrote (int32 for llama3.1-405b).",
        )
    ids = np.empty(int(sizes.sum()) // (2 * width), dtype=np.dtype(dtype).newbyteorder("<"))
    offsets = np.concatenate([[0], np.cumsum(sizes // (2 * width))])
    target = memoryview(ids).cast("B") if ids.size else memoryview(b"")
    for answer, part in enumerate(data):
        try:
            target[offsets[answer] * width : offsets[answer + 1] * width] = binascii.unhexlify(part)
        except ValueError as error:
            raise LogError(
                "bad_accuracy",
                path,
                f"{error} in sample {qsl_idx[answer]}",
                "hex digits",
                "Copy the file again.",
            ) from error
    return AccuracyLog(
        np.array(qsl_idx, dtype=np.int64), offsets, ids, np.array(counts, dtype=np.int64), truncated
    )


def _scan_answers(raw: bytes, truncated: bool) -> tuple[list[int], list[int], list[bytes]]:
    """Sample indices, token counts (-1 without) and hex texts of all whole entries, without decoding JSON.

    One search a sample and no copy of the file: the log of 8313 long answers is 90 MB of hex.
    """
    qsl_idx, counts, data = [], [], []
    at = 0
    while found := _ENTRY.search(raw, at):
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


def figure_names() -> tuple[str, ...]:
    """Names of the figures of an MlperfRun, in order."""
    return tuple(item.name for item in fields(MlperfRun) if item.name in FIGURES)
