"""What a report says of a run, in words and shares: cause, remedy, tiles, bars, the line to paste."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ..errors import DisaggError
from ..files import read_json, read_json_lines
from ..results.criteria import FAIL, PASS, SHORTENED
from ..results.outputs import verdict_word
from ..results.published import KEPT_ASIDE, published_in, share_of_published
from ..results.rounds import load_rules
from ..results.rows import RunResult
from ..results.verdict import suggested_qps, worst_latency

MARK = 0.75  # where on a bar the limit stands
SIGNS = {PASS: "✓", FAIL: "✗"}


@dataclass(frozen=True)
class Bar:
    """A figure against its limit; shares are of the bar's width."""

    name: str
    filled: float
    mark: float
    status: str
    figure: str
    limit: str

    sign = property(lambda self: SIGNS.get(self.status, ""))
    over = property(lambda self: self.status == FAIL)

    @property
    def finding(self) -> str:
        """The bar in words, for who cannot see it."""
        word = {PASS: "kept", FAIL: "not kept"}.get(self.status, self.status)
        return f"{self.name} {self.figure} {self.limit}: {word}"


# -- the verdict in words


def no_result(run: Path, error: DisaggError) -> tuple[str, str]:
    """Cause and remedy of a run folder without readable logs: nothing yet, running, or how its job ended."""
    phases = read_json_lines(run / "job/phases.jsonl")
    last = phases[-1]["phase"] if phases else ""
    took = f"{phases[-1]['time_s'] - phases[0]['time_s']:.0f} s" if phases else ""
    name = run.resolve().name
    if not phases:
        return "No job yet: run 04_launch.", f"Or from a terminal: disagg launch {name}"
    if last.startswith("failed"):
        why = last.partition(": ")[2]
        mend = "The logs that exist are in logs/. Mend the cause, then make a new run with 03_configuration."
        return f"No result: {why}{'' if 'after' in why else f', after {took}'}.", mend
    if last == "done":
        return f"No result, though the job ended: {error}", "See logs/."
    when = f"Run this again when it has ended; to follow it: disagg attach {name}"
    return f"No result yet: the job is in its phase {last}, begun {took} after its start.", when


def unfinished(run: Path) -> str:
    """What a run's job still did, or why it failed, after it had measured; "" if it ended well, or is not ours."""
    phases = read_json_lines(run / "job/phases.jsonl")
    last = phases[-1]["phase"] if phases else "done"
    if last.startswith("failed"):
        return f" The job then failed: {last.partition(': ')[2].rstrip('.')}."
    return "" if last == "done" else f" The job is in its phase {last}, or was ended in it."


def cause_of(result: RunResult) -> str:
    """One sentence: what fails, or that nothing does."""
    checks = {check.name: check for check in result.verdict.checks}
    if not result.verdict.failed:
        kept = [f"{words} {_time(check.figure)} of {_time(check.limit)}"
                for name, words in (("ttft_p99", "TTFT p99"), ("tpot_p99", "TPOT p99")) if (check := checks.get(name))]  # fmt: skip
        if kept:
            return f"Both limits are kept: {', '.join(kept)}."
        return f"No check failed of the {len(checks)} that this run's files allow."
    first = result.verdict.failed[0]
    over = f" ({_percent(-first.margin)} over)" if first.margin < 0 else ""
    against = f"{_time(first.figure)}, limit {_time(first.limit)}{over}." if "p99" in first.name else ""
    if first.name == "ttft_p99":
        return f"First tokens come too late: TTFT p99 {against}"
    if first.name == "tpot_p99":
        return f"Tokens come too slowly: TPOT p99 {against}"
    figure, limit = (v if isinstance(v, str) else f"{v:,.7g}" for v in (first.figure, first.limit))
    return f"{first.name.replace('_', ' ').capitalize()}: {figure} against {limit} {first.unit}".strip() + "."


def remedy_of(result: RunResult) -> str:
    """One sentence: what to do next."""
    verdict, run = result.verdict, result.run
    if worst := worst_latency(verdict.checks):
        role = "ctx" if worst.name == "ttft_p99" else "gen"
        word = {"ctx": "context", "gen": "generation"}[role]
        count = result.files.parameters.get(f"num_{role}_servers")
        servers = f"the {_count(count, f'{word} server')}" if count else f"the {word} servers"
        why = f"prompts queue for {servers}" if role == "ctx" else f"the batches of {servers} grow too large"
        guess = math.floor(100 * suggested_qps(run.target_qps, worst)) / 100
        return (
            f"At {run.target_qps:g} queries/s {why}. Try server_target_qps {guess:g} (a first guess), "
            f"or one more {word} server."
        )
    if verdict.failed:
        return verdict.failed[0].advice
    if verdict.claim.source in ("rehearsed", "simulated"):
        return "The processes, HTTP and LoadGen were real, the GPUs' pace a model's: it is no measurement and can never be submitted."
    if verdict.claim.source == "measured":
        missing = "not judged yet: " + ", ".join(c.name.replace("_", " ") for c in verdict.not_judged)
        return (
            f"What was judged can be submitted; {missing}." if verdict.not_judged else "It can be submitted."
        )
    return ""


def proviso_of(result: RunResult) -> str:
    """Why a VALID run cannot be submitted, in some words."""
    source = result.verdict.claim.source
    if not result.verdict.valid or source == "published":
        return ""
    if source != "measured":
        return f"not submittable: {source}"
    return "not submittable yet" if result.verdict.not_judged else ""


def limits_note(result: RunResult) -> str:
    verdict = result.verdict
    said = [f"LoadGen's own word: {verdict.loadgen_valid or 'none'}."]
    scores = [
        f"accuracy_{name}" for name in load_rules()["models"].get(verdict.claim.model, {}).get("accuracy", {})
    ]
    judged = [c for c in verdict.checks if c.name in scores and c.status in (PASS, FAIL)]
    words = [f"{c.name.removeprefix('accuracy_')} {c.figure:.6g} {SIGNS[c.status]}" for c in judged
             if not isinstance(c.figure, str)]  # fmt: skip
    said.append(f"Accuracy: {', '.join(words)}." if words else "Accuracy was not judged.")
    short = [*(c.name.replace("_", " ") for c in verdict.shortened), *verdict.claim.shortened]
    return " ".join([*said, f"Shortened on purpose: {', '.join(short)}." if short else ""]).strip()


def what_served(result: RunResult) -> str:
    engine = result.files.parameters.get("engine")
    if engine in ("rehearsal", "trtllm"):
        dynamo = result.files.parameters.get("orchestrator") == "dynamo"
        return f"disaggregated TensorRT-LLM{' under Dynamo' if dynamo else ''}"
    return "an endpoint" if engine == "external" else ""


# -- tiles and bars


def tiles_of(result: RunResult, row: dict) -> Iterable[tuple[str, str, str]]:
    per_gpu, gpus, nodes = (row[n] for n in ("completed_tokens_per_s_per_gpu", "accelerators_total", "nodes"))
    yield (
        short(row["completed_tokens_per_s"]),
        "tokens/s",
        f"{short(per_gpu)} per GPU" if per_gpu > 0 else "",
    )
    completed, offered = row["samples_per_s"], row["target_qps"]
    share = f"of {offered:g} offered ({100 * completed / offered:.0f} %)" if offered > 0 else ""
    yield short(completed), f"{'samples' if row['scenario'] == 'Offline' else 'queries'}/s completed", share
    if gpus > 0:
        on = f" on {_count(int(nodes), 'node')}" if nodes > 0 else ""
        yield f"{gpus:.0f}", f"GPUs{on}", topology_words(result)
    else:
        yield "?", "GPUs", "the folder does not say how many"
    yield _compared(result, row)


def _compared(result: RunResult, row: dict) -> tuple[str, str, str]:
    """Tokens/s as a share of the published result on as many GPUs, else of the best one per GPU, or why there is none."""
    claim, per_gpu = result.verdict.claim, row["completed_tokens_per_s_per_gpu"]
    rates = published_in(claim.scenario, claim.round)
    best = rates["completed_tokens_per_s_per_gpu"].max()
    reasons = [claim.source] if claim.source in ("rehearsed", "simulated", "unstated") else []
    reasons += claim.shortened
    reasons += (
        [] if claim.model == "llama3.1-405b" and len(rates) else ["nothing published of its kind is here"]
    )
    reasons += [] if per_gpu > 0 else ["GPUs unknown"]
    if reasons:
        return "not compared", "with published results:", "; ".join(reasons)
    aside = KEPT_ASIDE.get((rates["round"].iloc[0], claim.scenario), 0)
    invalid = "" if result.verdict.valid else "; but this run is INVALID"
    of_best = f"{best:.1f} in {claim.scenario}, {rates['round'].iloc[0]}, {len(rates)} of {len(rates) + aside} runs{invalid}"
    share = f"{100 * per_gpu / best:.0f} %"
    if alike := share_of_published(SimpleNamespace(**row)):
        return f"{100 * alike[0]:.0f} %", f"of {alike[1]}", f"{share} of the best tokens/s/GPU: {of_best}"
    return share, "of the best published tokens/s/GPU", of_best


def topology_words(result: RunResult, joint: str = " + ", spelled: bool = True) -> str:
    """`4 x TP4 context + 1 x TP4 generation`, by the run's parameters; what system it was where there are none."""
    p = result.files.parameters
    parts = []
    for role, word in (("ctx", " context"), ("gen", " generation")):
        if count := p.get(f"num_{role}_servers"):
            pp = p.get(f"{role}_pp_size") or 1
            parts.append(
                f"{count} x TP{p.get(f'{role}_tp_size') or '?'}{f' PP{pp}' if pp > 1 else ''}{word if spelled else ''}"
            )
    return joint.join(parts) or str(result.files.system.get("system_name") or "")


def bars_of(checks: tuple) -> Iterable[Bar]:
    """TTFT, TPOT, queries over a limit, duration: one scale, the limit at the same place."""
    by_name = {check.name: check for check in checks}
    for name, words in (("ttft_p99", "Time to first token"), ("tpot_p99", "Time per output token")):
        if (check := by_name.get(name)) and check.limit:
            filled = min(1.0, MARK * check.figure / check.limit)
            figure = f"{short(check.figure)} ms"
            yield Bar(words, filled, MARK, check.status, figure, f"of {check.limit:,.0f}")
    counts = [c for c in checks if c.name.startswith("early_stopping_") and "over the limit" in c.unit]
    if counts:
        yield _queries_over(max(counts, key=lambda c: (c.status == FAIL, c.figure - c.limit)))
    if (check := by_name.get("duration")) and check.limit:
        filled = min(1.0, MARK * check.figure / check.limit)
        on_purpose = check.status == SHORTENED
        limit = (
            f"of {check.limit:,.0f}, short on purpose" if on_purpose else f"of at least {check.limit:,.0f}"
        )
        yield Bar("Duration", filled, MARK, check.status, f"{check.figure:,.0f} s", limit)


def _queries_over(check) -> Bar:
    """How many queries were over a limit of how many that early stopping allows; the log gives bounds alone."""
    bound = "at most " if "most" in check.unit else "at least " if check.status == FAIL else ""
    figure = f"{bound if check.figure else ''}{check.figure:,.0f}"
    scale = check.limit / MARK or max(check.figure, 1)
    mark = MARK if check.limit else 0.0
    filled = min(1.0, check.figure / scale)
    return Bar("Queries over a limit", filled, mark, check.status, figure, f"({check.limit:,.0f} allowed)")


def paste_line(result: RunResult, row: dict) -> str:
    """`INVALID (rehearsed) 405B Interactive v5.1 · 20 GPUs 4xTP4+1xTP4 · 3.85 QPS · 241 tok/s · ... · bae0e30`."""
    claim, checks = result.verdict.claim, {check.name: check for check in result.verdict.checks}
    topology = topology_words(result, "+", spelled=False).replace(" x ", "x")
    gpus = (
        f"{row['accelerators_total']:.0f} GPUs {topology}".strip()
        if row["accelerators_total"] > 0
        else topology
    )
    ttft, tpot = checks.get("ttft_p99"), checks.get("tpot_p99")
    commit = (read_json(result.files.base / "manifest.json").get("git") or {}).get("commit") or ""
    parts = [
        f"{verdict_word(result.verdict)} ({claim.source}) {claim.model.split('-')[-1].upper()} "
        f"{claim.scenario} {claim.round}",
        gpus,
        f"{row['target_qps']:g} QPS" if row["target_qps"] > 0 else "",
        f"{short(row['completed_tokens_per_s'])} tok/s",
        f"TTFT {ttft.figure / 1e3:.2f}/{ttft.limit / 1e3:g} s {SIGNS[ttft.status]}" if ttft else "",
        f"TPOT {short(tpot.figure)}/{tpot.limit:g} ms {SIGNS[tpot.status]}" if tpot else "",
        commit[:7],
    ]
    return " · ".join(filter(None, parts))


# -- figures as text


def short(value: float) -> str:
    """Three digits, or all before the point."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{short(ms)} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
