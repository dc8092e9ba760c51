"""The validity gate: every check a reviewer makes on a run, by name, with figure, limit, margin and what to do.

Three words, never mixed: `loadgen_valid` is LoadGen's own; `valid` says that no check of the claimed round and scenario
failed, of the checks that this run's files allow; `submittable` is exactly: valid, and measured. So a measured run whose
accuracy was not evaluated can be both, which a search for the QPS needs; its verdict says what is not judged yet, and the
export of a submission lists what is missing. A measured run of a model without rules is not valid: nothing can judge it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from .errors import DisaggError
from .mlperf_logs import NAN, PERCENTILES, AccuracyScores, MlperfRun

PASS, FAIL, SHORTENED, NOT_JUDGED = "pass", "fail", "shortened on purpose", "not judged"
#: what a rehearsal leaves short so that it ends in minutes
SHORTENED_IN_REHEARSAL = ("min_duration", "duration", "query_count", "performance_sample_count", "equal_issue",
                          "token_counts")  # fmt: skip


class ClaimError(DisaggError):
    """A run claims a round that data/rounds.yaml does not know."""


@dataclass(frozen=True)
class Claim:
    """What a run says of itself: judged as this and as nothing else."""

    model: str  # "" : unknown
    scenario: str  # Server | Interactive | Offline | SingleStream | MultiStream
    round: str = "v5.1"
    source: str = "measured"  # measured | rehearsed | simulated | published
    division: str = "closed"
    data_set: str = ""  # synthetic | pickle, where the run says it
    shortened: tuple[str, ...] = ()  # what a rehearsal changed that no check sees: output lengths, the pace


@dataclass(frozen=True)
class Check:
    """One named check. `margin` is the distance to the limit as a share of it, positive when on the good side."""

    name: str
    status: str
    figure: float | str
    limit: float | str
    unit: str
    advice: str

    @property
    def margin(self) -> float:
        """(limit - figure) / limit; NaN where either is no number."""
        if isinstance(self.figure, str) or isinstance(self.limit, str) or not self.limit:
            return NAN
        return (self.limit - self.figure) / self.limit


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one run."""

    claim: Claim
    checks: tuple[Check, ...]
    loadgen_valid: str
    suggestion: str
    note: str = ""  # what changes no verdict and should be known

    def of(self, status: str) -> tuple[Check, ...]:
        """The checks with one status, in order."""
        return tuple(check for check in self.checks if check.status == status)

    failed = property(lambda self: self.of(FAIL))
    shortened = property(lambda self: self.of(SHORTENED))
    not_judged = property(lambda self: self.of(NOT_JUDGED))

    @property
    def valid(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def submittable(self) -> bool:
        """Valid, and measured."""
        return self.valid and self.claim.source == "measured"

    def text(self) -> str:
        """A few sentences for a person: the word, why, what was shortened, what to do."""
        return "\n".join(_sentences(self))


@functools.cache
def load_rules(path: Path = Path(__file__).parent / "data" / "rounds.yaml") -> dict:
    """The rules file as plain values."""
    return yaml.safe_load(path.read_text())


def model_of(name: str) -> str:
    """The rules' name of a model, from any name that submitters or LoadGen use; "" if there are no rules for it."""
    models = load_rules()["models"].items()
    return next((model for model, rules in models if name.lower() in rules["names"]), "")


def limits_ms(model: str, scenario: str) -> tuple[float, float] | None:
    """TTFT and TPOT limit (ms, p99) of a model and scenario; None where there are none."""
    limits = load_rules()["models"].get(model, {}).get("limits", {}).get(scenario)
    return (float(limits[0]), float(limits[1])) if limits else None


@functools.lru_cache(maxsize=256)
def allowed_over_limit(queries: int, percentile: float = 0.99, confidence: float = 0.99) -> int:
    """How many of `queries` may be over the limit; -1 if even none is too few queries to judge.

    The largest t with P[Binomial(queries, 1 - percentile) <= t] <= 1 - confidence, exactly, in logarithms.
    Source: mlcommons/inference, loadgen/early_stopping.cc (the regularised beta function is this sum).
    """
    top = int(queries * (1 - percentile)) + 1
    k = np.arange(1, top + 1)
    steps = np.log((queries - k + 1) / k) + math.log((1 - percentile) / percentile)
    log_pmf = np.concatenate([[0.0], np.cumsum(steps)]) + queries * math.log(percentile)
    log_cdf = np.logaddexp.accumulate(log_pmf)
    return int(np.searchsorted(log_cdf, math.log(1 - confidence) + 1e-12, side="right")) - 1


def over_limit_bounds(run: MlperfRun, figure: str, limit_ms: float) -> tuple[int, int]:
    """Fewest and most queries over a limit that the log's percentiles allow; `figure` is ttft or tpot.

    LoadGen's p-th percentile of n sorted values is the one at index floor(n p).
    """
    n = int(run.query_count)
    fewest, most = 0, n
    for name, percentile in PERCENTILES.items():
        index = int(n * percentile)
        if getattr(run, f"{figure}_{name}_ms") > limit_ms:
            fewest = max(fewest, n - index)
        else:
            most = min(most, n - 1 - index)
    if getattr(run, f"{figure}_max_ms") <= limit_ms:
        most = 0
    return fewest, most


def judge(
    run: MlperfRun,
    claim: Claim,
    scores: AccuracyScores | None = None,
    accuracy_run: MlperfRun | None = None,
    client: Mapping | None = None,
    accuracy_error: str = "",
) -> Verdict:
    """Judge a performance run, and its accuracy where there is one, by the rules of what it claims.

    Parameters
    ----------
    run : the performance run.
    claim : model, scenario and round to judge by, and where the figures come from.
    scores : of accuracy.txt; without it accuracy reads 'not judged'.
    accuracy_run : LoadGen's own files of the accuracy run.
    accuracy_error : why the accuracy run's logs cannot be read, if they are there and cannot.
    client : our client's job/client_performance.json; None where another client ran.

    Raises
    ------
    ClaimError : the round is not in data/rounds.yaml.
    """
    rules = load_rules()
    if claim.round not in rules["rounds"]:
        known = ", ".join(rules["rounds"])
        raise ClaimError(f"round {claim.round}: found no rules for it; there are {known}")
    # what a person can act on comes first: the first failed check is the one that the table names
    makers = (_token_latency_checks, _claim_checks, _setting_checks, _count_checks, _loadgen_checks)
    model = rules["models"].get(claim.model, {})
    found = [check for make in makers for check in make(run, claim, rules["rounds"][claim.round], model)]
    found += _client_checks(client)
    found += _accuracy_checks(claim, model, scores, accuracy_run)
    if accuracy_error:
        found.append(_check("accuracy_log", False, "unreadable", "readable", accuracy_error))
    checks = tuple(_soften(check, claim) for check in found)
    return Verdict(claim, checks, run.loadgen_valid, _suggest(run, checks), _client_words(client or {}))


def _check(name: str, good: bool, figure: float | str, limit: float | str, advice: str = "") -> Check:
    unit, todo = load_rules()["checks"].get(name, ("", ""))
    return Check(name, PASS if good else FAIL, figure, limit, unit, advice or todo)


def _flag(name: str, on: bool) -> Check:
    return _check(name, on, "yes" if on else "no", "yes")


def _soften(check: Check, claim: Claim) -> Check:
    """In a rehearsal some checks are short on purpose and accuracy means nothing."""
    if claim.source in ("rehearsed", "simulated"):
        if check.name.startswith("accuracy"):
            return replace(check, status=NOT_JUDGED)
        if check.status == FAIL and check.name in SHORTENED_IN_REHEARSAL:
            return replace(check, status=SHORTENED)
    return check


def _loadgen_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """LoadGen's own words. Its VALID ignores errors, so these are two checks."""
    yield _check("test_mode", run.mode == "performance", run.mode, "performance")
    word = run.loadgen_valid
    said = f"LoadGen: {run.invalid_reason or 'see above'}"
    yield _check("loadgen_verdict", word == "VALID", word, "VALID", said)
    yield _check("loadgen_errors", run.error_count == 0, run.error_count, 0, "; ".join(run.errors)[:200])
    for name in ("perf_constraints_met", "min_duration_met", "min_queries_met", "early_stopping_met"):
        if getattr(run, name) is not None:
            yield _flag(name, getattr(run, name))


def _claim_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Is the run of the kind that it claims to be?"""
    found, needed = run.loadgen_scenario, "Server" if claim.scenario == "Interactive" else claim.scenario
    todo = f"{claim.scenario} is LoadGen's {needed}."
    yield _check("loadgen_scenario", found == needed, found, needed, todo)
    if claim.data_set and claim.source == "measured":
        todo = "Made-up prompts measure nothing that a round knows: set dataset_path."
        yield _check("data_set", claim.data_set != "synthetic", claim.data_set, "the benchmark's", todo)
    if not model:
        status = FAIL if claim.source == "measured" else NOT_JUDGED
        todo = "data/rounds.yaml has no rules for it."
        yield Check("model_rules", status, claim.model or "unknown", "a known model", "", todo)
        return
    dropped = rules["drop_scenarios"].get(claim.model, [])
    allowed = [scenario for scenario in model["scenarios"] if scenario not in dropped]
    todo = f"{claim.round} has no {claim.scenario} for {claim.model}."
    words = " or ".join(allowed) or "none"
    yield _check("scenario_in_round", claim.scenario in allowed, claim.scenario, words, todo)


def _setting_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Seeds, duration, percentile, samples: what user.conf and LoadGen's compiled-in mlperf.conf decide."""
    names = ("seed_qsl", "seed_sample_index", "seed_schedule")
    for name, found, needed in zip(names, run.seeds, rules["seeds"], strict=True):
        others = [r for r, other in load_rules()["rounds"].items() if found in other["seeds"]]
        hint = f"This is a seed of {others[0]}." if others else "No round has this seed."
        todo = f"{hint} Use the LoadGen whose compiled-in seeds are {claim.round}'s (5.1.2 for v5.1)."
        yield _check(name, found == needed, str(found), str(needed), todo)
    least_ms = rules["min_duration_ms"]
    yield _check("min_duration", run.min_duration_ms >= least_ms, run.min_duration_ms, least_ms)
    if run.loadgen_scenario in ("Server", "Offline"):
        good = run.duration_s * 1e3 >= least_ms * (1 - 1e-5)  # from a rate of six digits
        yield _check("duration", good, round(run.duration_s, 3), least_ms / 1e3)
    if run.loadgen_scenario == "Server":
        found = run.detail.get("effective_target_latency_percentile")
        needed = load_rules()["early_stopping"]["percentile"]
        yield _check("latency_percentile", found == needed, found or NAN, needed)
    if model:
        count = run.performance_sample_count
        yield _check("performance_sample_count", count >= model["samples"], count, model["samples"])
    if model.get("equal_issue"):
        yield _flag("equal_issue", run.equal_issue)
    if bound := model.get("target_latency_ms", {}).get(claim.scenario):
        yield _check("target_latency", run.target_latency_ms <= bound, run.target_latency_ms, bound)


def _token_latency_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """TTFT and TPOT against the limits of the claimed scenario, never against the log's own."""
    if not model.get("limits"):
        return
    yield _flag("use_token_latencies", run.use_token_latencies)
    limits = limits_ms(claim.model, claim.scenario)
    if limits is None or not run.use_token_latencies or math.isnan(run.query_count):
        return
    for figure, limit in zip(("ttft", "tpot"), limits, strict=True):
        own, value = getattr(run, f"{figure}_limit_ms"), getattr(run, f"{figure}_p99_ms")
        yield _check(f"{figure}_setting", own <= limit, own, limit)
        yield _check(f"{figure}_p99", value < limit, value, limit)
        yield _early_stopping(run, figure, limit, own)


def _early_stopping(run: MlperfRun, figure: str, limit: float, own_limit: float) -> Check:
    """Recompute early stopping: the over-limit queries that the percentiles allow against the exact allowance."""
    name, n = f"early_stopping_{figure}", int(run.query_count)
    allowed = allowed_over_limit(n, **load_rules()["early_stopping"])
    if allowed < 0:
        return Check(name, FAIL, n, 459, "queries", "Fewer than 459 queries cannot be judged: issue more.")
    fewest, most = over_limit_bounds(run, figure, limit)
    word = " ".join(getattr(run, name).split())
    status, count, unit = PASS, fewest, "queries over the limit, at least"
    todo = f"{allowed} of {n} queries may be over {limit:g} ms: lower target_qps. LoadGen: {word or '-'}"
    if fewest > allowed or "unsuccessful" in word:
        status = FAIL
    elif most <= allowed:
        count, unit = most, "queries over the limit, at most"
    elif own_limit > limit or "successful" not in word:
        status = NOT_JUDGED
        todo = f"LoadGen's count is of {own_limit:g} ms or absent; the percentiles leave {fewest} to {most} open."
    return Check(name, status, count, allowed, unit, todo)


def _count_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Figures that must fit each other: queries, tokens, rates."""
    # without equal issue LoadGen draws a reserve of queries that it need not issue
    lost = run.generated_query_count - run.query_count
    good = lost == 0 if run.equal_issue else lost >= 0 or math.isnan(lost)
    yield _check("queries_completed", good, run.query_count, run.generated_query_count)
    if model and run.loadgen_scenario in ("Server", "Offline"):
        yield _query_count(run, model)
    if run.completed_tokens_per_s > 0 or run.use_token_latencies:
        tokens = run.completed_tokens_per_s / run.samples_per_s if run.samples_per_s else NAN
        most = model.get("max_tokens", math.inf)
        fits = 2 <= tokens <= most * (1 + 1e-5) and not run.tpot_min_ms <= 0 and not run.ttft_min_ms <= 0
        yield _check("token_counts", fits, round(tokens, 3), most)
    if run.loadgen_scenario == "Server":
        yield _completed_rate(run)


def _query_count(run: MlperfRun, model: dict) -> Check:
    """Server: whole permutations of the data set, enough for early stopping; Offline: samples in its one query."""
    server, equal, samples = run.loadgen_scenario == "Server", model.get("equal_issue"), model["samples"]
    found = run.query_count if server else run.samples_per_query
    least = samples if equal else 1 if server else model.get("offline_samples", samples)
    good = found >= least and (not equal or found % samples == 0)
    todo = f"Needed: {least} or more{f', in multiples of {samples}' if equal else ''}."
    return replace(_check("query_count", good, found, least, todo), unit="queries" if server else "samples")


def _completed_rate(run: MlperfRun) -> Check:
    """Completed against scheduled rate.

    Between the last scheduled query and the last answer no more time can pass than the longest latency: a lower
    completed rate contradicts the log's other figures.
    """
    scheduled, longest_s = run.scheduled_samples_per_s, run.latency_max_ms / 1e3
    took_s = run.query_count / scheduled + longest_s if scheduled else NAN
    least = run.query_count / took_s if took_s > 0 else NAN
    good = least * (1 - 2e-5) <= run.samples_per_s <= scheduled * (1 + 2e-5)
    todo = (
        f"Scheduled were {scheduled:g} samples/s, and the longest answer took {longest_s:g} s: completed must lie "
        "between these. Do the files belong to one run?"
    )
    return _check("completed_rate", good, run.samples_per_s, round(least, 6), todo)


def _client_checks(client: Mapping | None) -> Iterator[Check]:
    """Requests that our client saw fail: an INVALID run, whatever LoadGen says."""
    if client is None:
        return
    failed = client.get("failed") or 0
    failed = sum(failed.values()) if isinstance(failed, Mapping) else int(failed)
    said = "; ".join(client.get("reasons") or []) or "see job/client_performance.json"
    good = failed == 0 and bool(client.get("valid_client", True))
    yield _check("client_failures", good, failed, 0, f"The client: {said}.")


def _client_words(client: Mapping) -> str:
    """Says what of the client's own stands in LoadGen's TTFT: lateness, and requests that were sent twice."""
    words = []
    if client.get("resent"):
        words.append(
            f"The client sent {client['resent']} requests twice, because the server ended their idle connections as they "
            "were written. TTFT includes that. Raise the server's keep-alive time above the client's keep_alive_s (3 s)."
        )
    if not client.get("client_was_late"):
        return " ".join(words)
    words.append(
        f"The client itself was late: {client['late_issues']} of {client['issued']} requests left more than "
        f"{_number(client['late_limit_ms'])} ms (1 % of the TTFT limit) after their time, p99 {client['late_p99_ms']:.1f} ms. "
        "TTFT includes that. Give the client a core of its own."
    )
    return " ".join(words)


def _accuracy_checks(
    claim: Claim, model: dict, scores: AccuracyScores | None, accuracy_run: MlperfRun | None
) -> Iterator[Check]:
    """Accuracy bounds of the model, which the open division waives; all samples evaluated; counts that fit each other."""
    if accuracy_run is not None:
        # as the checker counts: one published summary reports one that its log lacks
        count = len(accuracy_run.errors)
        yield _check("accuracy_errors", count == 0, count, 0)
        seen, full = accuracy_run.generated_samples, accuracy_run.dataset_samples
        yield _check("accuracy_queries", seen >= full, seen, full)
    bounds = model.get("accuracy", {})
    if not bounds:
        yield Check("accuracy_scores", NOT_JUDGED, NAN, NAN, "", "No bounds are known here.")
        return
    for name, (low, high) in bounds.items():
        figure = scores.get(name) if scores else NAN
        high = math.inf if high is None else high
        todo = f"{name} must be {low:g} to {high:g}. Check the decoding settings and the checkpoint."
        limit = high if figure > high else low
        check = _check(f"accuracy_{name}", low <= figure <= high, figure, limit, todo)
        if math.isnan(figure):
            check = replace(check, status=NOT_JUDGED, advice="Make the accuracy run and evaluate it.")
        elif claim.division == "open" and check.status == FAIL:
            check = replace(check, status=NOT_JUDGED)
        yield check
    if scores is None:
        return
    number, tokens, mean = (scores.get(name) for name in ("gen_num", "gen_tok_len", "tokens_per_sample"))
    if not math.isnan(number):
        yield _check("accuracy_samples", number == model["samples"], number, model["samples"])
    if number > 0 and not math.isnan(tokens + mean):
        fits = abs(tokens / number - mean) <= 0.0500001  # one decimal is written
        yield _check("accuracy_token_counts", fits, round(tokens / number, 4), mean)


def _suggest(run: MlperfRun, checks: tuple[Check, ...]) -> str:
    """A first guess at the load, from how far the worst latency is over its limit; "" where none is due."""
    gated = ("ttft_p99", "tpot_p99")
    over = [c for c in checks if c.status == FAIL and c.name in gated and c.figure >= c.limit]
    if not over or math.isnan(run.target_qps):
        return ""
    worst = max(over, key=lambda check: check.figure / check.limit)
    guess = math.floor(run.target_qps * worst.limit / worst.figure * 0.99 * 1000) / 1000
    return (
        f"{worst.name} is {worst.figure / worst.limit - 1:.1%} over its limit: try target_qps {guess:g} "
        f"(now {run.target_qps:g}). A first guess that takes latency as proportional to load."
    )


def _sentences(verdict: Verdict) -> Iterator[str]:
    claim = verdict.claim
    what = f"{claim.model or 'unknown model'} {claim.scenario}, rules of {claim.round}, {claim.source}"
    yield f"{'VALID' if verdict.valid else 'INVALID'} ({what}; LoadGen's own word: {verdict.loadgen_valid or 'none'})."
    for check in verdict.failed:
        yield f"  {check.name}: {_figures(check)}. {check.advice}"
    if verdict.suggestion:
        yield f"  {verdict.suggestion}"
    if verdict.note:
        yield f"  {verdict.note}"
    short = [(c, f"{_number(c.figure)} of {_number(c.limit)} {c.unit}".strip()) for c in verdict.shortened]
    listed = [f"{check.name} ({figures})" for check, figures in short]
    if listed or claim.shortened:
        yield f"  Shortened on purpose: {', '.join([*listed, *claim.shortened])}."
    if verdict.not_judged:
        yield f"  Not judged: {', '.join(check.name for check in verdict.not_judged)}."
    if verdict.submittable:
        yield f"  Submittable: yes{', by what was judged: the rest is still missing' if verdict.not_judged else ''}."
    elif claim.source != "measured":
        yield f"  Submittable: no, because its source is {claim.source}."
    else:
        yield f"  Submittable: no, because {verdict.failed[0].name} fails."


def _figures(check: Check) -> str:
    """e.g. `88.1 ms against 80 ms (10.1 % over)`."""
    text = f"{_number(check.figure)} {check.unit}".strip() + f" against {_number(check.limit)}"
    if math.isnan(check.margin) or check.unit != "ms" or check.name == "min_duration":
        return text
    return f"{text} ms ({-check.margin:.2%} over)" if check.margin < 0 else f"{text} ms (not below)"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.7g}"
