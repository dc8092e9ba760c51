"""The validity gate: every check a reviewer makes on a run, by name, with figure, limit, margin and what to do.

Three words, never mixed: `loadgen_valid` is LoadGen's own; `valid` says that no check of the claimed round and scenario
failed, of the checks that this run's files allow, and is None for a model without rules; `submittable` is yes, no or
`not yet`: measured and without a failure, but something that a submission wants is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import ClaimError
from .accuracy_criteria import AccuracyHalf, accuracy_checks
from .criteria import (
    CLAIMED,
    FAIL,
    NOT_JUDGED,
    SHORTENED,
    Claim,
    Criterion,
    claim_checks,
    count_checks,
    latency_checks,
    loadgen_checks,
    located,
    setting_checks,
    token_latency_checks,
)
from .folder_criteria import folder_checks
from .found import RunFiles, network_host
from .logs import DETAIL, MlperfRun
from .rounds import load_rules

#: what a rehearsal leaves short so that it ends in minutes
SHORTENED_IN_REHEARSAL = ("min_duration", "duration", "query_count", "performance_sample_count", "equal_issue",
                          "token_counts", "tokens_per_sample")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one run."""

    claim: Claim
    checks: tuple[Criterion, ...]
    loadgen_valid: str
    suggestion: str
    note: str = ""  # what changes no verdict and should be known

    def of(self, status: str) -> tuple[Criterion, ...]:
        """The checks with one status, in order."""
        return tuple(check for check in self.checks if check.status == status)

    failed = property(lambda self: self.of(FAIL))
    shortened = property(lambda self: self.of(SHORTENED))
    not_judged = property(lambda self: self.of(NOT_JUDGED))

    @property
    def valid(self) -> bool | None:
        """No check failed; None if none did, but nobody has whole rules for this model."""
        if self.failed:
            return False
        return True if load_rules()["models"].get(self.claim.model, {}).get("accuracy") else None

    @property
    def submittable(self) -> str:
        """yes | no | not yet: the last if nothing failed and something is not judged."""
        if self.failed or self.claim.source != "measured":
            return "no"
        return "not yet" if self.not_judged else "yes"

    def text(self) -> str:
        """A few sentences for a person: the word, why, what was shortened, what to do."""
        return "\n".join(_sentences(self))


def judge(
    run: MlperfRun, claim: Claim, accuracy: AccuracyHalf | None = None, files: RunFiles | None = None
) -> Verdict:
    """Judge a performance run, its accuracy half and the files beside them by the rules of what it claims.

    Raises
    ------
    ClaimError : the round is not in data/rounds.yaml.
    """
    rules = load_rules()
    if claim.round not in rules["rounds"]:
        known = ", ".join(rules["rounds"])
        raise ClaimError(f"round {claim.round}: found no rules for it; there are {known}")
    # what a person can act on comes first: the first failed check is the one that the table names
    makers = token_latency_checks, claim_checks, setting_checks, count_checks, latency_checks, loadgen_checks
    model, accuracy = rules["models"].get(claim.model, {}), accuracy or AccuracyHalf()
    found = [check for make in makers for check in make(run, claim, rules["rounds"][claim.round], model)]
    found = list(located(f"{run.log_dir.name}/{DETAIL}", found))
    found += folder_checks(run, claim, files, accuracy.scores) if files else []
    found += accuracy_checks(run, claim, model, accuracy)
    checks = tuple(_soften(check, claim) for check in found)
    note = _client_words(files.clients.get("performance", {})) + _network_words(files) if files else ""
    return Verdict(claim, checks, run.loadgen_valid, _suggest(run, checks), note.strip())


def _soften(check: Criterion, claim: Claim) -> Criterion:
    """In a rehearsal some checks are short on purpose and accuracy means nothing.

    What no checker asks for was seen in all published runs of one model alone: it fails no published run of another.
    """
    if claim.source in ("rehearsed", "simulated"):
        if check.status == FAIL and check.name.startswith("accuracy"):
            return replace(check, status=NOT_JUDGED)
        if check.status == FAIL and check.name in SHORTENED_IN_REHEARSAL:
            return replace(check, status=SHORTENED)
    proven = load_rules()["beyond_the_checker"]
    if claim.source == "published" and claim.model != proven["model"] and check.name in proven["checks"]:
        return replace(check, status=NOT_JUDGED) if check.status == FAIL else check
    return check


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


def _network_words(files: RunFiles) -> str:
    """Says which division a run is of, if LoadGen reached its server over a network."""
    host = network_host(files.settings)
    return f" LoadGen reached {host} over a network: such a run is of the network division, or of open." if host else ""


def worst_latency(checks: tuple[Criterion, ...]) -> Criterion | None:
    """The percentile that is furthest over its limit, as a share of it; None if both are below."""
    gated = ("ttft_p99", "tpot_p99")
    over = [c for c in checks if c.status == FAIL and c.name in gated and c.figure >= c.limit]
    return max(over, key=lambda check: check.figure / check.limit, default=None)


def suggested_qps(target_qps: float, worst: Criterion) -> float:
    """A first guess at the load that keeps a limit: takes latency as proportional to load, and 1 % less."""
    return math.floor(target_qps * worst.limit / worst.figure * 0.99 * 1000) / 1000


def _suggest(run: MlperfRun, checks: tuple[Criterion, ...]) -> str:
    """A first guess at the load, in a sentence; "" where none is due."""
    worst = worst_latency(checks)
    if worst is None or math.isnan(run.target_qps):
        return ""
    guess = suggested_qps(run.target_qps, worst)
    return (
        f"{worst.name} is {worst.figure / worst.limit - 1:.1%} over its limit: try target_qps {guess:g} "
        f"(now {run.target_qps:g}). A first guess that takes latency as proportional to load."
    )


def _sentences(verdict: Verdict) -> Iterator[str]:
    claim = verdict.claim
    guess = f", guessed from {claim.guessed}" if claim.guessed else ""
    what = f"{claim.model or 'unknown model'}{guess}, {claim.scenario}, rules of {claim.round}, {claim.source}"
    what += f" ({claim.source_from})" if claim.source_from.startswith("asserted") else ""
    word = {True: "VALID", False: "INVALID", None: "NOT JUDGED: no whole rules for this model"}[verdict.valid]
    yield f"{word} ({what}; LoadGen's own word: {verdict.loadgen_valid or 'none'})."
    for check in verdict.failed:
        yield f"  {check.name}: {_figures(check)}, {check.file}. {check.advice}"
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
    if claim.source == "unstated":
        yield "  Submittable: no, because nobody states its source. If you measured it, assert it: --source measured."
    elif claim.source != "measured":
        yield f"  Submittable: no, because its source is {claim.source}."
    elif verdict.failed:
        yield f"  Submittable: no, because {verdict.failed[0].name} fails."
    else:
        missing = "; ".join(dict.fromkeys(check.advice for check in verdict.not_judged if check.advice))
        yield f"  Submittable: {verdict.submittable}{': ' + missing if missing else ''}"


def _figures(check: Criterion) -> str:
    """e.g. `88.1 ms against 80 ms (10.1 % over)`."""
    text = f"{_number(check.figure)} {check.unit}".strip() + f" against {_number(check.limit)}"
    if math.isnan(check.margin) or check.unit != "ms" or check.name == "min_duration":
        return text
    return f"{text} ms ({-check.margin:.2%} over)" if check.margin < 0 else f"{text} ms (not below)"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.7g}"
