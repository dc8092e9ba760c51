"""The validity gate: every check a reviewer makes on a run, by name, with figure, limit, margin and what to do.

Three words, never mixed: `loadgen_valid` is LoadGen's own; `valid` says that no check of the claimed round and scenario
failed, of the checks that this run's files allow; `submittable` is exactly: valid, and measured. So a measured run whose
accuracy was not evaluated can be both, which a search for the QPS needs; its verdict says what is not judged yet, and the
export of a submission lists what is missing. A measured run of a model without rules is not valid: nothing can judge it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import ClaimError
from .accuracy_log import AccuracyScores
from .criteria import (
    FAIL,
    NOT_JUDGED,
    SHORTENED,
    Check,
    Claim,
    accuracy_checks,
    claim_checks,
    client_checks,
    count_checks,
    loadgen_checks,
    rule_check,
    setting_checks,
    token_latency_checks,
)
from .logs import MlperfRun
from .rounds import load_rules

#: what a rehearsal leaves short so that it ends in minutes
SHORTENED_IN_REHEARSAL = ("min_duration", "duration", "query_count", "performance_sample_count", "equal_issue",
                          "token_counts")  # fmt: skip


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
    makers = (token_latency_checks, claim_checks, setting_checks, count_checks, loadgen_checks)
    model = rules["models"].get(claim.model, {})
    found = [check for make in makers for check in make(run, claim, rules["rounds"][claim.round], model)]
    found += client_checks(client)
    found += accuracy_checks(claim, model, scores, accuracy_run)
    if accuracy_error:
        found.append(rule_check("accuracy_log", False, "unreadable", "readable", accuracy_error))
    checks = tuple(_soften(check, claim) for check in found)
    return Verdict(claim, checks, run.loadgen_valid, _suggest(run, checks), _client_words(client or {}))


def _soften(check: Check, claim: Claim) -> Check:
    """In a rehearsal some checks are short on purpose and accuracy means nothing."""
    if claim.source in ("rehearsed", "simulated"):
        if check.name.startswith("accuracy"):
            return replace(check, status=NOT_JUDGED)
        if check.status == FAIL and check.name in SHORTENED_IN_REHEARSAL:
            return replace(check, status=SHORTENED)
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


def worst_latency(checks: tuple[Check, ...]) -> Check | None:
    """The percentile that is furthest over its limit, as a share of it; None if both are below."""
    gated = ("ttft_p99", "tpot_p99")
    over = [c for c in checks if c.status == FAIL and c.name in gated and c.figure >= c.limit]
    return max(over, key=lambda check: check.figure / check.limit, default=None)


def suggested_qps(target_qps: float, worst: Check) -> float:
    """A first guess at the load that keeps a limit: takes latency as proportional to load, and 1 % less."""
    return math.floor(target_qps * worst.limit / worst.figure * 0.99 * 1000) / 1000


def _suggest(run: MlperfRun, checks: tuple[Check, ...]) -> str:
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
