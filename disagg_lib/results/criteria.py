"""What a run must meet, one check after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .logs import NAN, PERCENTILES, MlperfRun
from .rounds import allowed_over_limit, limits_ms, load_rules, over_limit_bounds

PASS, FAIL, SHORTENED, NOT_JUDGED = "pass", "fail", "shortened on purpose", "not judged"
CLAIMED = ("measured", "unstated")  # sources whose figures somebody may yet claim
ROUNDED = 1e-5  # LoadGen writes rates with six digits
APART = 0.05  # by how much figures of one run may differ that need not be equal: published ones stay within 0.023


@dataclass(frozen=True)
class Claim:
    """What a run says of itself: judged as this and as nothing else."""

    model: str  # "" : unknown
    scenario: str  # Server | Interactive | Offline | SingleStream | MultiStream
    round: str = "v5.1"
    source: str = "unstated"  # measured | rehearsed | simulated | published | unstated: nobody says
    source_from: str = ""  # the files that say so, or who asserted it
    division: str = "closed"
    guessed: str = ""  # from what the model was guessed, where no file names it
    data_set: str = ""  # synthetic | pickle, where the run says it
    shortened: tuple[str, ...] = ()  # what a rehearsal changed that no check sees: output lengths, the pace


@dataclass(frozen=True)
class Criterion:
    """One figure held against a limit. `margin` is the distance to the limit as a share of it, positive when on the good side."""

    name: str
    status: str
    figure: float | str
    limit: float | str
    unit: str
    advice: str
    file: str = ""  # that holds the figure

    @property
    def margin(self) -> float:
        """(limit - figure) / limit; NaN where either is no number."""
        if isinstance(self.figure, str) or isinstance(self.limit, str) or not self.limit:
            return NAN
        return (self.limit - self.figure) / self.limit


def held(name: str, good: bool, figure: float | str, limit: float | str, advice: str = "") -> Criterion:
    """A figure held against a limit; unit and advice are those of data/rounds.yaml unless better ones are given."""
    unit, todo = load_rules()["checks"].get(name, ("", ""))
    return Criterion(name, PASS if good else FAIL, figure, limit, unit, advice or todo)


def located(file: str, checks: Iterable[Criterion]) -> Iterator[Criterion]:
    """The same checks, which say what file their figure is of."""
    return (check if check.file else replace(check, file=file) for check in checks)


def _flag(name: str, on: bool) -> Criterion:
    return held(name, on, "yes" if on else "no", "yes")


def loadgen_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """LoadGen's own words. Its VALID ignores errors, so these are two checks."""
    yield held("test_mode", run.mode == "performance", run.mode, "performance")
    word = run.loadgen_valid
    said = f"LoadGen: {run.invalid_reason or 'see above'}"
    yield held("loadgen_verdict", word == "VALID", word, "VALID", said)
    yield held("loadgen_errors", run.error_count == 0, run.error_count, 0, "; ".join(run.errors)[:200])
    for name in ("perf_constraints_met", "min_duration_met", "min_queries_met", "early_stopping_met"):
        if getattr(run, name) is not None:
            yield _flag(name, getattr(run, name))


def claim_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """Is the run of the kind that it claims to be?"""
    found, needed = run.loadgen_scenario, "Server" if claim.scenario == "Interactive" else claim.scenario
    todo = f"{claim.scenario} is LoadGen's {needed}."
    yield held("loadgen_scenario", found == needed, found, needed, todo)
    if claim.data_set and claim.source in CLAIMED:
        todo = "Made-up prompts measure nothing that a round knows: set dataset_path."
        yield held("data_set", claim.data_set != "synthetic", claim.data_set, "the benchmark's", todo)
    if not model:
        status = FAIL if claim.source in CLAIMED else NOT_JUDGED
        todo = "data/rounds.yaml has no rules for it."
        yield Criterion("model_rules", status, claim.model or "unknown", "a known model", "", todo)
        return
    dropped = rules["drop_scenarios"].get(claim.model, [])
    allowed = [scenario for scenario in model["scenarios"] if scenario not in dropped]
    todo = f"{claim.round} has no {claim.scenario} for {claim.model}."
    words = " or ".join(allowed) or "none"
    yield held("scenario_in_round", claim.scenario in allowed, claim.scenario, words, todo)


def setting_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """Seeds, duration, percentile, samples: what user.conf and LoadGen's compiled-in mlperf.conf decide."""
    names = ("seed_qsl", "seed_sample_index", "seed_schedule")
    for name, found, needed in zip(names, run.seeds, rules["seeds"], strict=True):
        others = [r for r, other in load_rules()["rounds"].items() if found in other["seeds"]]
        hint = f"This is a seed of {others[0]}." if others else "No round has this seed."
        todo = f"{hint} Use the LoadGen whose compiled-in seeds are {claim.round}'s (5.1.2 for v5.1)."
        yield held(name, found == needed, str(found), str(needed), todo)
    least_ms = rules["min_duration_ms"]
    yield held("min_duration", run.min_duration_ms >= least_ms, run.min_duration_ms, least_ms)
    if run.loadgen_scenario in ("Server", "Offline"):
        good = run.duration_s * 1e3 >= least_ms * (1 - 1e-5)  # from a rate of six digits
        yield held("duration", good, round(run.duration_s, 3), least_ms / 1e3)
    if run.loadgen_scenario == "Server":
        found = run.detail.get("effective_target_latency_percentile")
        needed = load_rules()["early_stopping"]["percentile"]
        yield held("latency_percentile", found == needed, found or NAN, needed)
    if model:
        count = run.performance_sample_count
        yield held("performance_sample_count", count >= model["samples"], count, model["samples"])
    if model.get("equal_issue"):
        yield _flag("equal_issue", run.equal_issue)
    for name in ("performance_issue_same", "performance_issue_unique"):
        on = run.detail.get(f"effective_{name}", False)
        yield held(name, not on, "yes" if on else "no", "no")
    most_ms = run.detail.get("effective_max_duration_ms", 0)
    yield held("max_duration", not most_ms, most_ms, 0)
    if bound := model.get("target_latency_ms", {}).get(claim.scenario):
        yield held("target_latency", run.target_latency_ms <= bound, run.target_latency_ms, bound)


def token_latency_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """TTFT and TPOT against the limits of the claimed scenario, never against the log's own."""
    if not model.get("limits"):
        return
    yield _flag("use_token_latencies", run.use_token_latencies)
    limits = limits_ms(claim.model, claim.scenario)
    if limits is None or not run.use_token_latencies or math.isnan(run.query_count):
        return
    for figure, limit in zip(("ttft", "tpot"), limits, strict=True):
        own, value = getattr(run, f"{figure}_limit_ms"), getattr(run, f"{figure}_p99_ms")
        yield held(f"{figure}_setting", own <= limit, own, limit)
        yield held(f"{figure}_p99", value < limit, value, limit)
        yield _early_stopping(run, figure, limit, own)


def _early_stopping(run: MlperfRun, figure: str, limit: float, own_limit: float) -> Criterion:
    """Recompute early stopping: the over-limit queries that the percentiles allow against the exact allowance."""
    name, n = f"early_stopping_{figure}", int(run.query_count)
    allowed = allowed_over_limit(n, **load_rules()["early_stopping"])
    if allowed < 0:
        return Criterion(name, FAIL, n, 459, "queries", "Fewer than 459 queries cannot be judged: issue more.")
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
    return Criterion(name, status, count, allowed, unit, todo)


def count_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """Figures that must fit each other: queries, tokens, rates."""
    # without equal issue LoadGen draws a reserve of queries that it need not issue; for Offline 4.1 does so with it, too
    lost = run.generated_query_count - run.query_count
    reserve = not run.equal_issue or run.loadgen_scenario == "Offline"
    good = lost == 0 or (reserve and lost >= 0) or math.isnan(lost)
    yield held("queries_completed", good, run.query_count, run.generated_query_count)
    if model and run.loadgen_scenario in ("Server", "Offline"):
        yield _query_count(run, model)
    if run.completed_tokens_per_s > 0 or run.use_token_latencies:
        tokens, most = run.tokens_per_sample, model.get("max_tokens", math.inf)
        fits = 2 <= tokens * (1 + ROUNDED) and tokens <= most * (1 + ROUNDED)
        fits = fits and not run.tpot_min_ms <= 0 and not run.ttft_min_ms <= 0
        yield held("token_counts", fits, round(tokens, 3), most)
    if run.loadgen_scenario == "Server":
        yield _completed_rate(run)
        yield _scheduled_rate(run)


def latency_checks(run: MlperfRun, claim: Claim, rules: dict, model: dict) -> Iterator[Criterion]:
    """Latencies that must fit each other: in order, means in between, the whole equal to the sum of its parts."""
    for family in ("latency", "ttft", "tpot"):
        yield from _order(run, family)
    if run.loadgen_scenario == "Server" and run.use_token_latencies and run.tokens_per_sample > 1:
        parts_ms = run.ttft_mean_ms + run.tpot_mean_ms * (run.tokens_per_sample - 1)
        fits = math.isclose(parts_ms, run.latency_mean_ms, rel_tol=APART)
        yield held("latency_sum", fits, round(parts_ms, 3), run.latency_mean_ms)


def _order(run: MlperfRun, family: str) -> Iterator[Criterion]:
    """Minimum, percentiles and maximum do not fall, and the mean lies between the ends; none without figures."""
    names = [f"{family}_{part}_ms" for part in ("min", *PERCENTILES, "max")]
    pairs = [*itertools.pairwise(names), (names[0], f"{family}_mean_ms"), (f"{family}_mean_ms", names[-1])]
    known = [(low, high) for low, high in pairs if not math.isnan(getattr(run, low) + getattr(run, high))]
    wrong = next((pair for pair in known if getattr(run, pair[0]) > getattr(run, pair[1])), None)
    low, high = wrong or (names[0], names[-1])
    todo = f"{low} must not be above {high}: the figures are not of one run."
    if known:
        yield held(f"{family}_order", not wrong, getattr(run, low), getattr(run, high), todo)


def _query_count(run: MlperfRun, model: dict) -> Criterion:
    """Server: whole permutations of the data set, enough for early stopping; Offline: samples in its one query."""
    server, equal, samples = run.loadgen_scenario == "Server", model.get("equal_issue"), model["samples"]
    found = run.query_count if server else run.samples_per_query
    least = samples if equal else 1 if server else model.get("offline_samples", samples)
    good = found >= least and (not equal or found % samples == 0)
    todo = f"Needed: {least} or more{f', in multiples of {samples}' if equal else ''}."
    return replace(
        held("query_count", good, found, least, todo), unit="queries" if server else "samples"
    )


def _completed_rate(run: MlperfRun) -> Criterion:
    """Completed against scheduled rate; neither counts the last query.

    Between the last scheduled query and the last answer no more time can pass than the longest latency: a lower
    completed rate contradicts the log's other figures.
    """
    scheduled, longest_s = run.scheduled_samples_per_s, run.latency_max_ms / 1e3
    took_s = (run.query_count - 1) / scheduled + longest_s if scheduled else NAN
    least = (run.query_count - 1) / took_s if took_s > 0 else NAN
    good = least * (1 - 2 * ROUNDED) <= run.samples_per_s <= scheduled * (1 + 2 * ROUNDED)
    todo = (
        f"Scheduled were {scheduled:g} samples/s, and the longest answer took {longest_s:g} s: completed must lie "
        "between these. Do the files belong to one run?"
    )
    return held("completed_rate", good, run.samples_per_s, round(least, 6), todo)


def _scheduled_rate(run: MlperfRun) -> Criterion:
    """Arrivals are Poisson's: the scheduled rate lies within six standard deviations of the target, or a tenth of it."""
    apart = max(0.1, 6 / math.sqrt(max(run.query_count, 1)))
    good = abs(run.scheduled_samples_per_s / run.target_qps - 1) <= apart if run.target_qps else False
    return held("scheduled_rate", good, run.scheduled_samples_per_s, run.target_qps)
