"""What the files beside LoadGen's must say: the client saw what LoadGen saw, and nothing contradicts the logs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..files import sha256
from .accuracy_log import AccuracyScores
from .criteria import CLAIMED, FAIL, NOT_JUDGED, ROUNDED, Claim, Criterion, held, located
from .found import RunFiles
from .logs import MlperfRun
from .rounds import load_rules
from .test06 import VERIFIED, failed_lines

RECORD = "job/digests.json"  # the job's last act


def folder_checks(
    run: MlperfRun, claim: Claim, files: RunFiles, scores: AccuracyScores | None
) -> Iterator[Criterion]:
    """Every check on the files beside the logs, as far as there are any."""
    for mode, client in files.clients.items():
        yield from located(f"job/client_{mode}.json", _client_failures(mode, client))
    if client := files.clients.get("performance"):
        yield from located("job/client_performance.json", _client_counts(run, client))
    yield from located("job/settings.json", _engine(files))
    if claim.source in CLAIMED:
        yield from located("the run folder", _absent_files(files))
    if files.parameters:  # published ones may be of another run than the log, and were accepted
        yield from located("user.conf", _user_conf(run, claim, files.base / "user.conf"))
    yield from located(RECORD, _digests(files))
    yield from located("accuracy/accuracy.txt", _written_scores(files, scores))
    yield from located(VERIFIED, _test06(files.base / VERIFIED, claim))


def _test06(verified: Path, claim: Claim) -> Iterator[Criterion]:
    """Its three lines, where the run was made; the open division waives it."""
    if verified.parent.is_dir():
        said = verified.read_text(errors="replace") if verified.is_file() else ""
        wrong = failed_lines(said)
        check = held("test06", not wrong, "; ".join(wrong) if said else "not evaluated", "True")
        waived = check.status == FAIL and (claim.division == "open" or not said)
        yield replace(check, status=NOT_JUDGED) if waived else check


def _client_failures(mode: str, client: Mapping) -> Iterator[Criterion]:
    """Requests that our client saw fail: an INVALID run, whatever LoadGen says."""
    failed = max(_count(client.get("failed")), _count(client.get("kinds")))
    reasons = client.get("reasons") or [f"see job/client_{mode}.json"]
    said = "; ".join(map(str, reasons)) if isinstance(reasons, list) else reasons
    good = failed == 0 and bool(client.get("valid_client", True))
    name = "client_failures" if mode == "performance" else f"client_failures_{mode}"
    yield replace(held(name, good, failed, 0, f"The client: {said}."), unit="requests")


def _count(value: object) -> float:
    """A count, or the sum of counts by kind; NaN if it is neither."""
    values = value.values() if isinstance(value, Mapping) else [value or 0]
    return sum(v if isinstance(v, int | float) else math.nan for v in values)


def _client_counts(run: MlperfRun, client: Mapping) -> Iterator[Criterion]:
    """Our client's counts are LoadGen's: samples done, output tokens."""
    samples = run.query_count * run.samples_per_query
    if "done" in client:
        done = _count(client["done"]) + _count(client.get("failed"))
        yield held("client_samples", done == samples, done, samples)
    if "output_tokens" in client and run.completed_tokens_per_s > 0:
        found, tokens = _count(client["output_tokens"]), run.tokens_per_sample * samples
        yield held("client_tokens", math.isclose(found, tokens, rel_tol=3 * ROUNDED), found, round(tokens))


def _engine(files: RunFiles) -> Iterator[Criterion]:
    """All files of a run folder name one engine."""
    if len(engines := sorted(set(files.engines.values()))) > 1:
        said = ", ".join(f"{name} {engine}" for name, engine in files.engines.items())
        yield held("engine", False, said, "one engine")


def _absent_files(files: RunFiles) -> Iterator[Criterion]:
    """A run folder of ours has its settings, and what our client saw of each test mode."""
    if not files.parameters:
        return
    needed = [] if files.settings else ["job/settings.json"]
    if files.parameters.get("client", "loadgen") == "loadgen":
        modes = {"performance": files.performance, "accuracy": files.accuracy}
        there = [mode for mode, folder in modes.items() if folder and any(folder.iterdir())]
        needed += [f"job/client_{mode}.json" for mode in there if mode not in files.clients]
    if needed:
        todo = "The job wrote it: copy the whole run folder."
        yield Criterion("run_files", NOT_JUDGED, "absent", ", ".join(needed), "", todo)


#: user.conf's keys -> what LoadGen says was requested, but for those under whose own name it says so
_REQUESTED = {
    "Server.target_qps": "server_target_qps",
    "Offline.target_qps": "offline_expected_qps",
    "min_duration": "min_duration_ms",
    "max_duration": "max_duration_ms",
}
_CONF_LINE = re.compile(r"(?m)^\s*([^#.\s]+)\.(\w+|\*)\.(\w+)\s*=\s*([-+.\deE]+)")


def _user_conf(run: MlperfRun, claim: Claim, path: Path) -> Iterator[Criterion]:
    """LoadGen ran with this user.conf: each of its values is what the log says was requested."""
    lines = _CONF_LINE.findall(path.read_text(errors="replace")) if path.is_file() else []
    names = ["*", *load_rules()["models"].get(claim.model, {}).get("names", [])]
    found = None
    for model, scenario, key, value in lines:
        key = _REQUESTED.get(f"{run.loadgen_scenario}.{key}", _REQUESTED.get(key, key))
        asked = run.detail.get(f"requested_{key}")
        ours = model in names and scenario in ("*", run.loadgen_scenario)
        if ours and isinstance(asked, int | float) and not _same(value, asked):
            found = found or (f"{key} = {value}", f"requested_{key} = {asked}")
    if lines:
        yield held("user_conf", not found, *(found or ("as requested", "as requested")))


def _same(written: str, asked: float) -> bool:
    try:
        return math.isclose(float(written), asked, rel_tol=ROUNDED)
    except ValueError:
        return False


def _digests(files: RunFiles) -> Iterator[Criterion]:
    """LoadGen's files, and what the job was told, are as the job left them."""
    record = files.base / RECORD
    if record.is_file():
        try:
            recorded = json.loads(record.read_text())["sha256"]
            other = [n for n, digest in recorded.items() if not _is(files.base / n, digest)]
        except (ValueError, KeyError, TypeError, AttributeError):
            other = [RECORD]
        yield held("digests", not other, ", ".join(other) or "as the job left them", "as the job left them")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _written_scores(files: RunFiles, scores: AccuracyScores | None) -> Iterator[Criterion]:
    """accuracy.txt says what the evaluation found."""
    path = files.base / "tables/accuracy.json"
    if not scores or not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
        other = [n for n, score in scores.scores.items() if n in found and found[n] != score]
    except (ValueError, TypeError):
        other = ["tables/accuracy.json cannot be read"]
    yield held("accuracy_txt", not other, ", ".join(other) or "as evaluated", "as evaluated")
