"""What a run must meet, one check after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from .accuracy_log import AccuracyScores
from .logs import NAN, MlperfRun
from .rounds import allowed_over_limit, limits_ms, load_rules, over_limit_bounds

PASS, FAIL, SHORTENED, NOT_JUDGED = "pass", "fail", "shortened on purpose", "not judged"


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


def rule_check(name: str, good: bool, figure: float | str, limit: float | str, advice: str = "") -> Check:
    unit, todo = load_rules()["checks"].get(name, ("", ""))
    return Check(name, PASS if good else FAIL, figure, limit, unit, advice or todo)


def _flag(name: str, on: bool) -> Check:
    return rule_check(name, on, "yes" if on else "no", "yes")


def loadgen_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """LoadGen's own words. Its VALID ignores errors, so these are two checks."""
    yield rule_check("test_mode", run.mode == "performance", run.mode, "performance")
    word = run.loadgen_valid
    said = f"LoadGen: {run.invalid_reason or 'see above'}"
    yield rule_check("loadgen_verdict", word == "VALID", word, "VALID", said)
    yield rule_check("loadgen_errors", run.error_count == 0, run.error_count, 0, "; ".join(run.errors)[:200])
    for name in ("perf_constraints_met", "min_duration_met", "min_queries_met", "early_stopping_met"):
        if getattr(run, name) is not None:
            yield _flag(name, getattr(run, name))


def claim_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Is the run of the kind that it claims to be?"""
    found, needed = run.loadgen_scenario, "Server" if claim.scenario == "Interactive" else claim.scenario
    todo = f"{claim.scenario} is LoadGen's {needed}."
    yield rule_check("loadgen_scenario", found == needed, found, needed, todo)
    if claim.data_set and claim.source == "measured":
        todo = "Made-up prompts measure nothing that a round knows: set dataset_path."
        yield rule_check("data_set", claim.data_set != "synthetic", claim.data_set, "the benchmark's", todo)
    if not model:
        status = FAIL if claim.source == "measured" else NOT_JUDGED
        todo = "data/rounds.yaml has no rules for it."
        yield Check("model_rules", status, claim.model or "unknown", "a known model", "", todo)
        return
    dropped = rules["drop_scenarios"].get(claim.model, [])
    allowed = [scenario for scenario in model["scenarios"] if scenario not in dropped]
    todo = f"{claim.round} has no {claim.scenario} for {claim.model}."
    words = " or ".join(allowed) or "none"
    yield rule_check("scenario_in_round", claim.scenario in allowed, claim.scenario, words, todo)


def setting_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Seeds, duration, percentile, samples: what user.conf and LoadGen's compiled-in mlperf.conf decide."""
    names = ("seed_qsl", "seed_sample_index", "seed_schedule")
    for name, found, needed in zip(names, run.seeds, rules["seeds"], strict=True):
        others = [r for r, other in load_rules()["rounds"].items() if found in other["seeds"]]
        hint = f"This is a seed of {others[0]}." if others else "No round has this seed."
        todo = f"{hint} Use the LoadGen whose compiled-in seeds are {claim.round}'s (5.1.2 for v5.1)."
        yield rule_check(name, found == needed, str(found), str(needed), todo)
    least_ms = rules["min_duration_ms"]
    yield rule_check("min_duration", run.min_duration_ms >= least_ms, run.min_duration_ms, least_ms)
    if run.loadgen_scenario in ("Server", "Offline"):
        good = run.duration_s * 1e3 >= least_ms * (1 - 1e-5)  # from a rate of six digits
        yield rule_check("duration", good, round(run.duration_s, 3), least_ms / 1e3)
    if run.loadgen_scenario == "Server":
        found = run.detail.get("effective_target_latency_percentile")
        needed = load_rules()["early_stopping"]["percentile"]
        yield rule_check("latency_percentile", found == needed, found or NAN, needed)
    if model:
        count = run.performance_sample_count
        yield rule_check("performance_sample_count", count >= model["samples"], count, model["samples"])
    if model.get("equal_issue"):
        yield _flag("equal_issue", run.equal_issue)
    if bound := model.get("target_latency_ms", {}).get(claim.scenario):
        yield rule_check("target_latency", run.target_latency_ms <= bound, run.target_latency_ms, bound)


def token_latency_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """TTFT and TPOT against the limits of the claimed scenario, never against the log's own."""
    if not model.get("limits"):
        return
    yield _flag("use_token_latencies", run.use_token_latencies)
    limits = limits_ms(claim.model, claim.scenario)
    if limits is None or not run.use_token_latencies or math.isnan(run.query_count):
        return
    for figure, limit in zip(("ttft", "tpot"), limits, strict=True):
        own, value = getattr(run, f"{figure}_limit_ms"), getattr(run, f"{figure}_p99_ms")
        yield rule_check(f"{figure}_setting", own <= limit, own, limit)
        yield rule_check(f"{figure}_p99", value < limit, value, limit)
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


def count_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Check]:
    """Figures that must fit each other: queries, tokens, rates."""
    # without equal issue LoadGen draws a reserve of queries that it need not issue
    lost = run.generated_query_count - run.query_count
    good = lost == 0 if run.equal_issue else lost >= 0 or math.isnan(lost)
    yield rule_check("queries_completed", good, run.query_count, run.generated_query_count)
    if model and run.loadgen_scenario in ("Server", "Offline"):
        yield _query_count(run, model)
    if run.completed_tokens_per_s > 0 or run.use_token_latencies:
        tokens = run.completed_tokens_per_s / run.samples_per_s if run.samples_per_s else NAN
        most = model.get("max_tokens", math.inf)
        fits = 2 <= tokens <= most * (1 + 1e-5) and not run.tpot_min_ms <= 0 and not run.ttft_min_ms <= 0
        yield rule_check("token_counts", fits, round(tokens, 3), most)
    if run.loadgen_scenario == "Server":
        yield _completed_rate(run)


def _query_count(run: MlperfRun, model: dict) -> Check:
    """Server: whole permutations of the data set, enough for early stopping; Offline: samples in its one query."""
    server, equal, samples = run.loadgen_scenario == "Server", model.get("equal_issue"), model["samples"]
    found = run.query_count if server else run.samples_per_query
    least = samples if equal else 1 if server else model.get("offline_samples", samples)
    good = found >= least and (not equal or found % samples == 0)
    todo = f"Needed: {least} or more{f', in multiples of {samples}' if equal else ''}."
    return replace(
        rule_check("query_count", good, found, least, todo), unit="queries" if server else "samples"
    )


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
    return rule_check("completed_rate", good, run.samples_per_s, round(least, 6), todo)


def client_checks(client: Mapping | None) -> Iterator[Check]:
    """Requests that our client saw fail: an INVALID run, whatever LoadGen says."""
    if client is None:
        return
    failed = client.get("failed") or 0
    failed = sum(failed.values()) if isinstance(failed, Mapping) else int(failed)
    said = "; ".join(client.get("reasons") or []) or "see job/client_performance.json"
    good = failed == 0 and bool(client.get("valid_client", True))
    yield rule_check("client_failures", good, failed, 0, f"The client: {said}.")


def accuracy_checks(
    claim: Claim, model: dict, scores: AccuracyScores | None, accuracy_run: MlperfRun | None
) -> Iterator[Check]:
    """Accuracy bounds of the model, which the open division waives; all samples evaluated; counts that fit each other."""
    if accuracy_run is not None:
        # as the checker counts: one published summary reports one that its log lacks
        count = len(accuracy_run.errors)
        yield rule_check("accuracy_errors", count == 0, count, 0)
        seen, full = accuracy_run.generated_samples, accuracy_run.dataset_samples
        yield rule_check("accuracy_queries", seen >= full, seen, full)
    bounds = model.get("accuracy", {})
    if not bounds:
        yield Check("accuracy_scores", NOT_JUDGED, NAN, NAN, "", "No bounds are known here.")
        return
    for name, (low, high) in bounds.items():
        figure = scores.get(name) if scores else NAN
        high = math.inf if high is None else high
        todo = f"{name} must be {low:g} to {high:g}. Check the decoding settings and the checkpoint."
        limit = high if figure > high else low
        check = rule_check(f"accuracy_{name}", low <= figure <= high, figure, limit, todo)
        if math.isnan(figure):
            check = replace(check, status=NOT_JUDGED, advice="Make the accuracy run and evaluate it.")
        elif claim.division == "open" and check.status == FAIL:
            check = replace(check, status=NOT_JUDGED)
        yield check
    if scores is None:
        return
    number, tokens, mean = (scores.get(name) for name in ("gen_num", "gen_tok_len", "tokens_per_sample"))
    if not math.isnan(number):
        yield rule_check("accuracy_samples", number == model["samples"], number, model["samples"])
    if number > 0 and not math.isnan(tokens + mean):
        fits = abs(tokens / number - mean) <= 0.0500001  # one decimal is written
        yield rule_check("accuracy_token_counts", fits, round(tokens / number, 4), mean)
