"""LoadGen's files -> values: one frozen MlperfRun per log folder, units in its names.

LoadGen writes integers of ns into the detail log and the summary; figures here are ns / 1e6, which is exact to the
last digit of the integer. `MlperfRun.detail` keeps LoadGen's own values under LoadGen's own keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import yaml

from ..errors import DisaggError
from ..files import DATA

SUMMARY, DETAIL, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
NAN = float("nan")

#: the ways in which a log can be bad -> what is needed instead, what to do, unless an error brings better words
CASES = {
    "missing_folder": ("LoadGen's folder", "Check the path."),
    "empty_folder": (f"{DETAIL} and {SUMMARY}", "Did LoadGen start at all? See logs/."),
    "missing_file": ("that file", "Copy it from the machine that wrote it."),
    "not_loadgen": ("LoadGen's detail log", "Give the folder that LoadGen wrote into (log_output.outdir)."),
    # a file ends inside what is written at once
    "cut_log": ("a whole file", "It was copied in part, or its writer was killed or still writes: copy it again, or run again."),
    # whole lines, but no result
    "killed_run": ("LoadGen's last lines", "The run was killed or still runs: see logs/ and job/phases.jsonl, then run it again."),
    "damaged_line": ("whole lines of LoadGen's", "The file is damaged: copy it again from the run."),
    "mixed_runs": ("summary and detail log of one run", "Copy both files again from the same run."),
    "bad_value": ("a number", "The file is damaged or was edited: copy it again from the run."),
    "bad_accuracy": ("hex digits", "Copy the file again."),
    "bad_experiment": ("`parameters:` with a `value:` for each name", "It must be the file that 03_configuration wrote."),
    "no_token_latencies": ("a Server or Interactive run with token latencies", "Draw another run."),
}  # fmt: skip


class LogError(DisaggError):
    """A LoadGen log, or a file beside it, is missing, cut short or contradicts itself; `case` names which: see CASES."""

    def __init__(self, case: str, where: Path, found: str, needed: str = "", todo: str = "") -> None:
        self.case = case
        needed, todo = needed or CASES[case][0], todo or CASES[case][1]
        super().__init__(f"{where}: {case.replace('_', ' ')}: found {found}; needed {needed}. {todo}")


#: p99 -> 0.99: the percentiles that LoadGen writes
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p97": 0.97, "p99": 0.99, "p999": 0.999}
_TABLE = yaml.safe_load((DATA / "loadgen_keys.yaml").read_text())
#: figure -> (detail-log keys in order of preference, divisor: ns into ms); the table names its sources
FIGURES: dict[str, tuple[tuple[str, ...], float]] = {
    name: (tuple(keys.split()), 1e6 if name.endswith("_ms") and not keys.endswith("duration_ms") else 1)
    for name, (keys, *_) in _TABLE["figures"].items()
}
#: summary label -> detail key: the summary prints what the detail log holds
SUMMARY_LABELS: dict[str, str] = _TABLE["labels"] | {
    label: FIGURES[name][0][0] for name, (_, *labels) in _TABLE["figures"].items() for label in labels
}

_TEXTS, _MET, _SEEDS, _MODES = (_TABLE[name] for name in ("texts", "met", "seeds", "modes"))
_FLAGS = {*_MET.values(), *_TABLE["flags"]}
_NUMBERS = {key for keys, _ in FIGURES.values() for key in keys} | {
    *("num_errors", "effective_target_latency_percentile", "effective_max_duration_ms", *_SEEDS)
}

_Figures = make_dataclass("_Figures", [(name, float) for name in FIGURES], frozen=True)


@dataclass(frozen=True)
class MlperfRun(_Figures):
    """One LoadGen run: the fields below and every figure of FIGURES (float).

    A figure that this kind of run does not have is NaN, and `missing` says why.
    """

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
    seeds: tuple[int | None, ...]  # qsl, sample index, schedule
    generated_samples: (
        int  # over all parts of the data set: an accuracy run draws each part that memory holds anew
    )
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    error_count: int
    missing: Mapping[str, str] = field(repr=False)
    detail: Mapping[str, object] = field(repr=False, compare=False)

    @property
    def duration_s(self) -> float:
        """Time by which LoadGen divides (s): Offline's longest latency; Server's samples/s leaves its last query out."""
        if self.loadgen_scenario == "Offline":
            return self.latency_max_ms / 1e3
        samples = self.query_count * self.samples_per_query - (self.loadgen_scenario == "Server")
        return samples / self.samples_per_s if self.samples_per_s else NAN

    @property
    def tokens_per_sample(self) -> float:
        """Mean output tokens: tokens/s counts those of every sample."""
        samples = self.query_count * self.samples_per_query
        return self.completed_tokens_per_s * self.duration_s / samples if samples else NAN


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
    LogError : its case says which of the ways to be bad.

    Source: mlcommons/inference, loadgen/results.cc and loadgen/logging.cc.
    """
    log_dir = Path(log_dir)
    detail_text, summary_text = _read_texts(log_dir)
    detail, errors, warnings = parse_detail(detail_text, log_dir / DETAIL)
    mode = _MODES.get(str(detail.get("effective_test_mode")), "")
    _refuse_cut(detail, summary_text, mode, log_dir)
    _refuse_bad_values(detail, log_dir / DETAIL)
    _refuse_mixed(detail, summary_text, log_dir)
    figures = {name: _figure(detail, keys, divisor) for name, (keys, divisor) in FIGURES.items()}
    scenario = str(detail["effective_scenario"])
    token_latencies = detail.get("requested_use_token_latencies", False)
    if scenario != "Server" or not token_latencies:
        figures["ttft_limit_ms"] = figures["tpot_limit_ms"] = NAN
    early = detail.get("early_stopping_result", "")
    # 4.1 and 5.0.15 write no num_errors: there the flagged lines, and the summary's word, are the only count
    said = re.search(r"^(\d+) ERROR", summary_text, re.MULTILINE)
    return MlperfRun(
        log_dir=log_dir,
        mode=mode,
        loadgen_scenario=scenario,
        **{name: str(detail.get(key, "")) for name, key in _TEXTS.items()},
        **{name: detail.get(key) for name, key in _MET.items()},
        early_stopping_ttft=str(detail.get("early_stopping_ttft_result", early)),
        early_stopping_tpot=str(detail.get("early_stopping_tpot_result", early)),
        use_token_latencies=token_latencies,
        equal_issue=detail.get("effective_sample_concatenate_permutation", False),
        seeds=tuple(map(detail.get, _SEEDS)),
        generated_samples=sum(map(math.prod, zip(*_drawn(detail_text), strict=False))),
        errors=errors,
        warnings=warnings,
        error_count=max(int(detail.get("num_errors", 0)), len(errors), int(said[1]) if said else 0),
        missing=_why_missing(figures, mode, scenario, token_latencies),
        detail=detail,
        **figures,
    )


def _drawn(detail_text: str) -> list[list[int]]:
    """Queries, and samples in each, of every time that LoadGen drew queries."""
    keys = ("generated_query_count", "generated_samples_per_query")
    return [[int(n) for n in re.findall(rf'"key": "{key}", "value": (\d+)', detail_text)] for key in keys]


def parse_detail(text: str, where: Path) -> tuple[dict[str, object], tuple[str, ...], tuple[str, ...]]:
    """Values by key (first one wins, as in the official parser), error texts, warning texts.

    LoadGen escapes nothing: a text may hold quotes and line breaks, so an entry reaches to the next `:::MLLOG`.
    Bulky lists and repeated keys are not decoded, but every entry must be whole.
    """
    before, *entries = ("\n" + text).split("\n:::MLLOG ")
    if not entries:
        raise LogError("not_loadgen", where, "no line `:::MLLOG ...`")
    values: dict[str, object] = {}
    errors, warnings = [], []
    for number, entry in enumerate(entries):
        begin, close = _ENTRY.match(entry), entry.rfind(', "time_ms": ')
        tail = _ENTRY_END.match(entry, close) if close > 0 else None
        key, raw = (begin[1], entry[begin.end() : close]) if begin and tail else ("", "")
        flagged = tail and ('"is_error": true' in tail[1] or '"is_warning": true' in tail[1])
        if key not in _TABLE["bulky"] and (key not in values or flagged):
            value = _value(raw)
            values.setdefault(key, value)
            if flagged:
                (errors if '"is_error": true' in tail[1] else warnings).append(str(value))
        if (
            not key
            or values.get(key, "") is None
            or ":::MLLOG" in raw
            or '"metadata": ' in raw
            or before.strip()
        ):
            raise _damaged(before, entries, number, cut=entry is entries[-1] and not tail, where=where)
    return values, tuple(errors), tuple(warnings)


_DECODER = json.JSONDecoder()
#: how an entry of the detail log begins, and what follows its value
_ENTRY = re.compile(r'\{"key": "([^"]+)", "value": ')
_ENTRY_END = re.compile(
    r', "time_ms": [\d.e+-]+, "namespace": "[^"]*", "event_type": "\w+", "metadata": \{([^{}]*)\}\}\s*\Z'
)


def _value(raw: str) -> object:
    """A value as LoadGen writes it: JSON, C++'s nan and inf, or a text with quotes in it; None if it is none of these."""
    with contextlib.suppress(ValueError):
        value, end = _DECODER.raw_decode(raw)
        if end == len(raw):
            return value
    if re.fullmatch("-?(nan|inf)", raw):
        return float(raw)
    return raw[1:-1] if raw[:1] == raw[-1:] == '"' else None


def _damaged(before: str, entries: list[str], number: int, cut: bool, where: Path) -> LogError:
    """The error for an entry that is not whole: `cut` short at the end of the file, or damaged."""
    line = 1 + sum(entry.count("\n") + 1 for entry in entries[:number]) if not before.strip() else 1
    found = f"line {line}, `{(before.strip() or entries[number])[:60]}`"
    return (
        LogError("cut_log", where, f"an end inside {found}")
        if cut
        else LogError("damaged_line", where, found)
    )


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
        raise LogError("missing_folder", log_dir, "no such folder")
    names = sorted(entry.name for entry in log_dir.iterdir())
    if not names:
        raise LogError("empty_folder", log_dir, "no files")
    for name in sorted({DETAIL, SUMMARY}.difference(names)):
        raise LogError("missing_file", log_dir / name, ", ".join(names[:5]))
    detail, summary = (
        (log_dir / name).read_bytes().decode("utf-8-sig", "replace") for name in (DETAIL, SUMMARY)
    )
    return detail, summary


def read_bytes(path: Path | str, todo: str) -> bytes:
    """A file's content; LogError `missing_file` if it is not there."""
    if not Path(path).is_file():
        raise LogError("missing_file", Path(path), "no such file", todo=todo)
    return Path(path).read_bytes()


def _refuse_cut(detail: Mapping, summary_text: str, mode: str, log_dir: Path) -> None:
    """Raise when a run ended before LoadGen had written all it writes, or the summary is not whole."""
    needed = ["effective_scenario", "effective_test_mode"]
    if mode == "accuracy":
        needed += ["power_end"]  # the last line of every accuracy log
    else:
        needed += ["result_validity", "result_query_count", "result_99.90_percentile_latency_ns"]
        if detail.get("effective_scenario") == "Server" and detail.get("requested_use_token_latencies"):
            needed += [
                FIGURES[name][0][0] for name in ("ttft_p99_ms", "tpot_p99_ms", "completed_tokens_per_s")
            ]
        version = re.findall(r"\d+", str(detail.get("loadgen_version")).split("@")[0])
        if tuple(map(int, version)) >= (5, 0, 21):
            needed += ["num_errors"]  # the last line of every performance log since then
    absent = [key for key in needed if key not in detail]
    if absent:
        raise LogError("killed_run", log_dir / DETAIL, f"{len(detail)} keys, but no `{absent[0]}`")
    if "ncountered" not in summary_text[-300:]:
        found = f"{len(summary_text)} characters without the closing line on errors"
        raise LogError("cut_log", log_dir / SUMMARY, found)


def _refuse_mixed(detail: Mapping, summary_text: str, log_dir: Path) -> None:
    """Raise when the summary's figures are not those of the detail log."""
    for label, value in parse_summary(summary_text).items():
        key = SUMMARY_LABELS.get(label)
        if key is None or key not in detail or not value:
            continue
        # MultiStream prints its block per query first: the same figure of whole queries, under names of its own
        whole = (key.replace("_latency_ns", f"{word}_latency_ns") for word in ("_query", "_per_query"))
        key = next((k for k in whole if k in detail), key)
        if not _same(value, detail[key]):
            found = f"{label} = {value}, but {DETAIL} has {key} = {detail[key]}"
            raise LogError("mixed_runs", log_dir / SUMMARY, found)


def _same(printed: str, value: object) -> bool:
    """Whether the summary's text and the detail log's value mean the same."""
    if isinstance(value, bool):
        return printed.lower() in (("yes", "1", "true") if value else ("no", "0", "false"))
    if not isinstance(value, int | float):
        return printed == str(value)
    if isinstance(value, int) and printed.isdigit():
        return int(printed) == value
    try:
        number = float(printed)
    except ValueError:
        return False
    last_digit = 10.0 ** -len(printed.partition(".")[2])  # Server's summary rounds to two decimals
    return math.isclose(number, value, rel_tol=5e-6, abs_tol=0.5000001 * last_digit if "." in printed else 0)


def _refuse_bad_values(detail: Mapping, where: Path) -> None:
    """Raise when a key holds something else than LoadGen writes there: a damaged or an edited log."""
    for key, value in detail.items():
        if key in _FLAGS:
            good, needed = isinstance(value, bool), "true or false"
        elif key in _NUMBERS:
            good, needed = type(value) in (int, float) and math.isfinite(value), "a number"
        else:
            continue
        if not good:
            raise LogError("bad_value", where, f"{key} = {str(value)[:60]}", needed)


def _figure(detail: Mapping, keys: tuple[str, ...], divisor: float) -> float:
    """The first key that the log has, as float; NaN without any."""
    for key in keys:
        if key in detail:
            return float(detail[key]) if divisor == 1 else detail[key] / divisor
    return NAN


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
