"""The validity gate: every check a reviewer makes on a run, by name, with figure, limit, margin and what to do.

Three words, never mixed: `loadgen_valid` is LoadGen's own; `valid` says that no check of the claimed round and scenario
failed; `submittable` says that all of them were judged, passed, and that the run was measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from .errors import DisaggError
from .mlperf_logs import NAN, AccuracyScores, MlperfRun

PASS, FAIL, SHORTENED, NOT_JUDGED = "pass", "fail", "shortened on purpose", "not judged"
#: what a rehearsal leaves short so that it ends in minutes
SHORTENED_IN_REHEARSAL = frozenset(
    {"min_duration", "duration", "query_count", "performance_sample_count", "equal_issue", "token_counts"}
)


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
        if (
            not isinstance(self.figure, int | float)
            or not isinstance(self.limit, int | float)
            or not self.limit
        ):
            return NAN
        return (self.limit - self.figure) / self.limit


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one run."""

    claim: Claim
    checks: tuple[Check, ...]
    loadgen_valid: str
    suggestion: str

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == FAIL)

    @property
    def shortened(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == SHORTENED)

    @property
    def not_judged(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == NOT_JUDGED)

    @property
    def valid(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def submittable(self) -> bool:
        """Valid, measured, and nothing shortened or left unjudged."""
        return self.claim.source == "measured" and all(check.status == PASS for check in self.checks)

    def text(self) -> str:
        """A few sentences for a person: the word, why, what was shortened, what to do."""
        return "\n".join(_sentences(self))


@functools.cache
def load_rules(path: Path = Path(__file__).parent / "data" / "rounds.yaml") -> dict:
    """The rules file as plain values."""
    return yaml.safe_load(path.read_text())


def model_of(name: str) -> str:
    """The rules' name of a model, from any name that submitters or LoadGen use; "" if there are no rules for it."""
    wanted = name.lower()
    for model, rules in load_rules()["models"].items():
        if wanted in rules["names"]:
            return model
    return ""


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
    for name, percentile in (
        ("p50", 0.5),
        ("p90", 0.9),
        ("p95", 0.95),
        ("p97", 0.97),
        ("p99", 0.99),
        ("p999", 0.999),
    ):
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
        raise ClaimError(
            f"round {claim.round}: found no rules for it; there are {', '.join(rules['rounds'])}"
        )
    makers: tuple[Callable[..., Iterator[Check]], ...] = (
        # what a person can act on comes first: the first failed check is the one that the table names
        _token_latency_checks,
        _claim_checks,
        _setting_checks,
        _count_checks,
        _loadgen_checks,
    )
    model = rules["models"].get(claim.model, {})
    found = [check for make in makers for check in make(run, claim, rules["rounds"][claim.round], model)]
    found += _client_checks(client)
    found += _accuracy_checks(claim, model, scores, accuracy_run)
    if accuracy_error:
        found.append(Check("accuracy_log", FAIL, "unreadable", "readable", "", accuracy_error))
    checks = tuple(_soften(check, claim) for check in found)
    return Verdict(claim, checks, run.loadgen_valid, _suggest(run, checks))


def _check(name: str, good: bool, figure, limit, unit: str, advice: str) -> Check:
    return Check(name, PASS if good else FAIL, figure, limit, unit, advice)


def _soften(check: Check, claim: Claim) -> Check:
    """In a rehearsal some checks are short on purpose and accuracy means nothing."""
    status = check.status
    if claim.source in ("rehearsed", "simulated"):
        if check.name.startswith("accuracy"):
            status = NOT_JUDGED
        elif status == FAIL and check.name in SHORTENED_IN_REHEARSAL:
            status = SHORTENED
    return Check(check.name, status, check.figure, check.limit, check.unit, check.advice)


def _loadgen_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """LoadGen's own words. Its VALID ignores errors, so these are two checks."""
    reason = run.invalid_reason or "see the checks below"
    yield _check(
        "test_mode", run.mode == "performance", run.mode, "performance", "", "Give a performance run."
    )
    yield _check(
        "loadgen_verdict", run.loadgen_valid == "VALID", run.loadgen_valid, "VALID", "", f"LoadGen: {reason}"
    )
    advice = "; ".join(run.errors)[:200] or "Read mlperf_log_detail.txt for lines with is_error."
    yield _check("loadgen_errors", run.error_count == 0, run.error_count, 0, "errors", advice)
    for name, met, todo in (
        ("perf_constraints_met", run.perf_constraints_met, "Lower target_qps."),
        ("min_duration_met", run.min_duration_met, "Let the run go on for min_duration."),
        ("min_queries_met", run.min_queries_met, "Let the run issue min_query_count queries."),
        ("early_stopping_met", run.early_stopping_met, "Lower target_qps, or issue more queries."),
    ):
        if met is not None:
            yield _check(name, met, "yes" if met else "no", "yes", "", todo)


def _claim_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Is the run of the kind that it claims to be?"""
    needed = "Server" if claim.scenario == "Interactive" else claim.scenario
    yield _check(
        "loadgen_scenario",
        run.loadgen_scenario == needed,
        run.loadgen_scenario,
        needed,
        "",
        f"{claim.scenario} is run as LoadGen's {needed}.",
    )
    if not model:
        yield Check(
            "model_rules",
            NOT_JUDGED,
            claim.model or "unknown",
            "",
            "",
            "data/rounds.yaml has no rules for it.",
        )
        return
    dropped = rules["drop_scenarios"].get(claim.model, [])
    allowed = [scenario for scenario in model["scenarios"] if scenario not in dropped]
    yield _check(
        "scenario_in_round",
        claim.scenario in allowed,
        claim.scenario,
        " or ".join(allowed) or "none",
        "",
        f"{claim.round} has no {claim.scenario} for {claim.model}.",
    )


def _setting_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Seeds, duration, percentile, samples: what user.conf and LoadGen's compiled-in mlperf.conf decide."""
    for name, found, needed in zip(
        ("qsl", "sample_index", "schedule"), run.seeds, rules["seeds"], strict=True
    ):
        others = [r for r, other in load_rules()["rounds"].items() if found in other["seeds"]]
        hint = f"This is a seed of {others[0]}." if others else "No round has this seed."
        todo = f"{hint} Use the LoadGen whose compiled-in seeds are {claim.round}'s (5.1.2 for v5.1)."
        yield _check(f"seed_{name}", found == needed, str(found), str(needed), "", todo)
    yield _check(
        "min_duration",
        run.min_duration_ms >= rules["min_duration_ms"],
        run.min_duration_ms,
        rules["min_duration_ms"],
        "ms",
        "Set *.Server.min_duration = 600000 in user.conf.",
    )
    if run.loadgen_scenario in ("Server", "Offline"):
        yield _check(
            "duration",
            run.duration_s * 1e3 >= rules["min_duration_ms"] * (1 - 1e-5),  # from a rate of six digits
            round(run.duration_s, 3),
            rules["min_duration_ms"] / 1e3,
            "s",
            "The run ended before its duration was over.",
        )
    percentile = run.detail.get("effective_target_latency_percentile")
    if run.loadgen_scenario == "Server":
        needed = load_rules()["early_stopping"]["percentile"]
        yield _check(
            "latency_percentile",
            percentile == needed,
            percentile,
            needed,
            "",
            "Drop target_latency_percentile.",
        )
    if not model:
        return
    yield _check(
        "performance_sample_count",
        run.performance_sample_count >= model["samples"],
        run.performance_sample_count,
        model["samples"],
        "samples",
        "Drop performance_sample_count_override from user.conf, or set it to the data set's size.",
    )
    if model.get("equal_issue"):
        yield _check(
            "equal_issue",
            run.equal_issue,
            "on" if run.equal_issue else "off",
            "on",
            "",
            "Drop sample_concatenate_permutation = 0 from user.conf.",
        )
    bound = model.get("target_latency_ms", {}).get(claim.scenario)
    if bound:
        yield _check(
            "target_latency",
            run.target_latency_ms <= bound,
            run.target_latency_ms,
            bound,
            "ms",
            "Drop target_latency.",
        )


def _token_latency_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """TTFT and TPOT against the limits of the claimed scenario, never against the log's own."""
    if not model.get("limits"):
        return
    yield _check(
        "use_token_latencies",
        run.use_token_latencies,
        "on" if run.use_token_latencies else "off",
        "on",
        "",
        "Give LoadGen the model key with an underscore, llama3_1-405b-interactive: another key loses it silently.",
    )
    limits = limits_ms(claim.model, claim.scenario)
    if limits is None or not run.use_token_latencies:
        return
    for figure, limit in zip(("ttft", "tpot"), limits, strict=True):
        own = getattr(run, f"{figure}_limit_ms")
        yield _check(
            f"{figure}_setting",
            own <= limit,
            own,
            limit,
            "ms",
            f"LoadGen judged by {own:g} ms: use the model key of {claim.scenario}, and drop the limit from user.conf.",
        )
        value = getattr(run, f"{figure}_p99_ms")
        yield _check(
            f"{figure}_p99",
            value < limit,
            value,
            limit,
            "ms",
            f"{figure.upper()} p99 must be below {limit:g} ms: lower target_qps, or "
            + (
                "add context servers."
                if figure == "ttft"
                else "lower gen_batch_size or add generation servers."
            ),
        )
        yield _early_stopping(run, figure, limit, own)


def _early_stopping(run: MlperfRun, figure: str, limit: float, own_limit: float) -> Check:
    """Recompute early stopping: the over-limit queries that the percentiles allow against the exact allowance."""
    name, n = f"early_stopping_{figure}", int(run.query_count)
    allowed = allowed_over_limit(n, **load_rules()["early_stopping"])
    fewest, most = over_limit_bounds(run, figure, limit)
    word = getattr(run, f"early_stopping_{figure}")
    todo = f"{allowed} of {n} queries may be over {limit:g} ms: lower target_qps."
    if allowed < 0:
        return Check(name, FAIL, n, 459, "queries", "Fewer than 459 queries cannot be judged: issue more.")
    if fewest > allowed:
        return Check(name, FAIL, fewest, allowed, "queries over the limit, at least", todo)
    if "unsuccessful" in word:
        todo = f"{todo} LoadGen: {' '.join(word.split())}"
        return Check(name, FAIL, fewest, allowed, "queries over the limit, at least", todo)
    if most <= allowed:
        return Check(name, PASS, most, allowed, "queries over the limit, at most", todo)
    if own_limit > limit or "successful" not in word:
        said = f"LoadGen's count is of {own_limit:g} ms or absent, and the percentiles leave {fewest} to {most} open."
        return Check(name, NOT_JUDGED, fewest, allowed, "queries over the limit, at least", said)
    return Check(name, PASS, fewest, allowed, "queries over the limit, at least (LoadGen counted)", todo)


def _count_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Figures that must fit each other: queries, tokens, rates."""
    # without equal issue LoadGen draws a reserve of queries that it need not issue
    lost = run.generated_query_count - run.query_count
    yield _check(
        "queries_completed",
        lost == 0 if run.equal_issue else lost >= 0 or math.isnan(lost),
        run.query_count,
        run.generated_query_count,
        "queries",
        "LoadGen judged another number of queries than it drew: the run was ended from outside.",
    )
    if model and run.loadgen_scenario in ("Server", "Offline"):
        yield _query_count(run, model)
    if run.completed_tokens_per_s > 0 or run.use_token_latencies:
        tokens = run.completed_tokens_per_s / run.samples_per_s if run.samples_per_s else NAN
        most = model.get("max_tokens", math.inf)
        fits = 2 <= tokens <= most * (1 + 1e-5) and not run.tpot_min_ms <= 0 and not run.ttft_min_ms <= 0
        yield _check(
            "token_counts",
            fits,
            round(tokens, 3),
            most,
            "tokens a sample",
            "An answer has 2 tokens or more and no more than the cap, TTFT and TPOT are above 0: "
            "the system under test reports token counts or first tokens wrongly.",
        )
    if run.loadgen_scenario == "Server":
        yield _completed_rate(run)


def _query_count(run: MlperfRun, model: dict) -> Check:
    """Server: whole permutations of the data set, enough for early stopping; Offline: samples in its one query."""
    server = run.loadgen_scenario == "Server"
    found = run.query_count if server else run.samples_per_query
    least = model["samples"] if model.get("equal_issue") else (1 if server else None)
    least = least or model.get("offline_samples", model["samples"])
    whole = not model.get("equal_issue") or found % model["samples"] == 0
    return _check(
        "query_count",
        found >= least and whole,
        found,
        least,
        "queries" if server else "samples",
        f"Needed: {least} or more"
        + (f", in multiples of {model['samples']}." if model.get("equal_issue") else "."),
    )


def _completed_rate(run: MlperfRun) -> Check:
    """Completed against scheduled rate.

    Between the last scheduled query and the last answer no more time can pass than the longest latency: a lower
    completed rate contradicts the log's other figures.
    """
    scheduled_s = run.query_count / run.scheduled_samples_per_s if run.scheduled_samples_per_s else NAN
    longest_s = scheduled_s + run.latency_max_ms / 1e3
    least = run.query_count / longest_s if longest_s > 0 else NAN
    good = least * (1 - 2e-5) <= run.samples_per_s <= run.scheduled_samples_per_s * (1 + 2e-5)
    return _check(
        "completed_rate",
        good,
        run.samples_per_s,
        round(least, 6),
        "samples/s",
        f"Scheduled were {run.scheduled_samples_per_s:g} samples/s, and the longest answer took "
        f"{run.latency_max_ms / 1e3:g} s: completed must lie between these. Do the files belong to one run?",
    )


def _client_checks(client: Mapping | None) -> Iterator[Check]:
    """Requests that our client saw fail: an INVALID run, whatever LoadGen says."""
    if client is None:
        return
    failed = client.get("failed") or 0
    failed = sum(failed.values()) if isinstance(failed, Mapping) else int(failed)
    good = failed == 0 and bool(client.get("valid_client", True))
    said = "; ".join(client.get("reasons") or []) or "see job/client_performance.json"
    yield _check("client_failures", good, failed, 0, "requests", f"The client: {said}.")


def _accuracy_checks(
    claim: Claim, model: dict, scores: AccuracyScores | None, accuracy_run: MlperfRun | None
) -> Iterator[Check]:
    """Accuracy bounds of the model. The open division waives the bounds."""
    if accuracy_run is not None:
        count = len(
            accuracy_run.errors
        )  # as the checker counts: one published summary reports one that its log lacks
        yield _check("accuracy_errors", count == 0, count, 0, "errors", "Read the accuracy run's detail log.")
        seen = accuracy_run.generated_query_count * max(1, accuracy_run.samples_per_query)
        full = accuracy_run.dataset_samples
        yield _check(
            "accuracy_queries", seen >= full, seen, full, "samples", "The accuracy run left samples out."
        )
    bounds = model.get("accuracy") or {"scores": [None, None]}
    for name, (low, high) in bounds.items():
        figure = scores.get(name) if scores is not None else NAN
        label = f"accuracy_{name}"
        if math.isnan(figure):
            todo = (
                "Make the accuracy run and evaluate it."
                if model.get("accuracy")
                else "No bounds are known here."
            )
            yield Check(label, NOT_JUDGED, NAN, low if low is not None else NAN, "", todo)
            continue
        status = PASS if (low is None or figure >= low) and (high is None or figure <= high) else FAIL
        if claim.division == "open" and status == FAIL:
            status = NOT_JUDGED
        limit = high if high is not None and figure > high else low
        said = f"{name} must be at least {low:g}" + (f" and at most {high:g}." if high is not None else ".")
        yield Check(
            label, status, figure, limit, "", said + " Check the decoding settings and the checkpoint."
        )
    if scores is not None and model.get("accuracy"):
        yield from _accuracy_counts(model, scores)


def _accuracy_counts(model: dict, scores: AccuracyScores) -> Iterator[Check]:
    """All samples were evaluated, and the token counts of accuracy.txt fit each other."""
    number, tokens, mean = scores.get("gen_num"), scores.get("gen_tok_len"), scores.get("tokens_per_sample")
    if not math.isnan(number):
        yield _check(
            "accuracy_samples",
            number == model["samples"],
            number,
            model["samples"],
            "samples",
            "Evaluate all samples.",
        )
    if number > 0 and not math.isnan(tokens) and not math.isnan(mean):
        fits = abs(tokens / number - mean) <= 0.0500001  # one decimal is written
        yield _check(
            "accuracy_token_counts",
            fits,
            round(tokens / number, 4),
            mean,
            "tokens a sample",
            "gen_tok_len / gen_num must be tokens_per_sample: accuracy.txt contradicts itself.",
        )


def _suggest(run: MlperfRun, checks: tuple[Check, ...]) -> str:
    """A first guess at the load, from how far the worst latency is over its limit; "" where none is due."""
    over = [
        c for c in checks if c.status == FAIL and c.name in ("ttft_p99", "tpot_p99") and c.figure >= c.limit
    ]
    if not over or math.isnan(run.target_qps):
        return ""
    worst = max(over, key=lambda check: check.figure / check.limit)
    share = worst.limit / worst.figure
    guess = math.floor(run.target_qps * share * 0.99 * 1000) / 1000
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
    listed = [
        f"{check.name} ({_number(check.figure)} of {_number(check.limit)}{check.unit and ' ' + check.unit})"
        for check in verdict.shortened
    ]
    if listed or claim.shortened:
        yield f"  Shortened on purpose: {', '.join([*listed, *claim.shortened])}."
    if verdict.not_judged:
        yield f"  Not judged: {', '.join(check.name for check in verdict.not_judged)}."
    yield f"  Submittable: {'yes' if verdict.submittable else 'no'}{_why_not(verdict)}."


def _why_not(verdict: Verdict) -> str:
    if verdict.submittable:
        return ""
    if verdict.claim.source != "measured":
        return f", because its source is {verdict.claim.source}"
    if verdict.failed:
        return f", because {verdict.failed[0].name} fails"
    return f", because {verdict.not_judged[0].name} is not judged"


def _figures(check: Check) -> str:
    """e.g. `88.1 ms against 80 ms (10.1 % over)`."""
    text = f"{_number(check.figure)} {check.unit}".strip() + f" against {_number(check.limit)}"
    if math.isnan(check.margin) or check.unit != "ms" or check.name == "min_duration":
        return text
    return f"{text} ms ({-check.margin:.2%} over)" if check.margin < 0 else f"{text} ms (not below)"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.7g}"
