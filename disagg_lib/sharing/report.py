"""One run on one card: the verdict, why, four figures, the limits, other runs, one line to paste.

Pure: a run folder in, an HTML text out that needs no script, nothing from elsewhere, and follows the reader's light or
dark setting. 05, index.html, the monitor, the picker and `run` show this one card; no word of it is written twice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import DisaggError
from ..files import read_json, read_json_lines
from ..results.criteria import FAIL, PASS, SHORTENED
from ..results.found import folder_source
from ..results.logs import LogError
from ..results.outputs import result_values, verdict_word
from ..results.published import compare, published_table
from ..results.rows import RunResult, as_table, read_result, result_row
from ..results.verdict import suggested_qps, worst_latency

MOST_BESIDE = 3  # other runs in the card
MARK = 0.75  # where on a bar the limit stands
MODELS = {"llama3.1-405b": "Llama-3.1-405B"}
SIGNS = {PASS: "✓", FAIL: "✗"}
PILLS = {
    "measured": "measured; not verified by MLCommons",
    "rehearsed": "rehearsed: no GPU was used",
    "published": "published by MLCommons",
    "simulated": "simulated: a model's word",
}


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


@dataclass(frozen=True)
class Report:
    """What the card says, in words and shares; `text`, `html`, `line` and `title` say it in one form each."""

    name: str
    source: str
    word: str  # VALID | INVALID | NOT JUDGED | NO RESULT
    cause: str
    remedy: str
    proviso: str = ""  # what a VALID run is not
    eyebrow: str = ""
    day: str = ""
    tiles: tuple[tuple[str, str, str], ...] = ()  # figure, what it is, more
    bars: tuple[Bar, ...] = ()
    limits_note: str = ""
    line: str = ""
    checks: str = ""  # the gate's own text, in full
    rows: tuple[dict, ...] = ()  # other runs and published ones
    values: dict[str, Any] = field(default_factory=dict)  # for machines: tables/result.json

    sign = property(lambda self: {"VALID": "✓", "INVALID": "✗"}.get(self.word, "–"))
    mood = property(lambda self: {"VALID": "good", "INVALID": "bad"}.get(self.word, "none"))
    pill = property(lambda self: PILLS.get(self.source, f"source: {self.source}"))
    has_result = property(lambda self: self.word != "NO RESULT")

    @property
    def title(self) -> str:
        """What chat programs show of a page: `INVALID (rehearsed) · 241 tokens/s · 20 GPUs · 30 Nov 2026`."""
        figures = [f"{figure} {what.split(' on ')[0]}" for figure, what, _ in self.tiles[::2]]
        return " · ".join(filter(None, [f"{self.word} ({self.source})", *figures, self.day or self.name]))

    def html(self, page: bool = False, **more: Any) -> str:
        """The card for a notebook; `page` makes it a page of its own with what `more` gives the template."""
        return _template().render(report=self, page=page, **more).replace(" %", "&nbsp;%")

    def text(self, width: int = 80) -> str:
        """The card for a terminal; no line is longer than `width`."""
        return "\n".join(line for line in _text_lines(self, width))

    def markdown(self) -> str:
        """The card for a git host's pages."""
        return "\n\n".join(filter(None, _markdown_parts(self)))

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """HTML in a browser, text in a log, and, as scrapbook reads it, the values for machines."""
        scrap = {
            "name": "result",
            "data": self.values | {"title": self.title},
            "encoder": "json",
            "version": 1,
        }
        data = {"text/plain": self.text(), "text/html": self.html()}
        if not self.values:
            return data, {}
        data["application/scrapbook.scrap.json+json"] = scrap
        return data, {"scrapbook": {"name": "result", "data": True, "display": False}}


def report_html(run: Path | str | RunResult, beside: Iterable[Path] = ()) -> str:
    """The card of a run as HTML for any cell, widget or page; `beside`: other runs to set it beside."""
    return make_report(run, beside).html()


def report_text(run: Path | str | RunResult, width: int = 80) -> str:
    """The card of a run for a terminal."""
    return make_report(run).text(width)


def report_line(run: Path | str | RunResult) -> str:
    """A run in one line, to paste."""
    return make_report(run).line


def make_report(run: Path | str | RunResult, beside: Iterable[Path] = ()) -> Report:
    """Read a run, if need be, and say it; a run folder without a result gives a report that says so.

    Raises
    ------
    LogError : no run folder, and no logs that can be read.
    """
    try:
        result = run if isinstance(run, RunResult) else read_result(run)
    except LogError as error:
        if not (Path(run) / "experiment.yaml").is_file():
            raise
        return _no_result(Path(run), error)
    row, verdict = result_row(result), result.verdict
    claim = verdict.claim
    bars = tuple(_bars(verdict.checks))
    return Report(
        name=Path(row["folder"]).resolve().name,
        source=claim.source,
        word=verdict_word(verdict),
        proviso=_proviso(result),
        cause=_cause(result) + _unfinished(result.files.base),
        remedy=_remedy(result),
        eyebrow=" · ".join(filter(None, [f"MLPerf Inference {claim.round}", MODELS.get(claim.model, claim.model),
                                         claim.scenario, _what_served(result)])),
        day=_day(row["test_datetime"]),
        tiles=tuple(_tiles(result, row)),
        bars=bars,
        limits_note=_limits_note(result),
        line=_line(result, row, bars),
        checks=verdict.text(),
        rows=tuple(beside_rows(row, beside)),
        values=result_values(result),
    )  # fmt: skip


# -- the verdict in words


def _no_result(run: Path, error: LogError) -> Report:
    """What a run folder without readable logs can say: nothing yet, running, or how its job ended."""
    phases = read_json_lines(run / "job/phases.jsonl")
    last = phases[-1]["phase"] if phases else ""
    took = f"{phases[-1]['time_s'] - phases[0]['time_s']:.0f} s" if phases else ""
    command = f"disagg attach {run.resolve().name}"
    if not phases:
        cause, remedy = (
            "No job yet: run 04_launch.",
            f"Or from a terminal: disagg launch {run.resolve().name}",
        )
    elif last.startswith("failed"):
        why = last.partition(": ")[2]
        cause = f"No result: {why}{'' if 'after' in why else f', after {took}'}."
        remedy = (
            "The logs that exist are in logs/. Mend the cause, then make a new run with 03_configuration."
        )
    elif last == "done":
        cause, remedy = f"No result, though the job ended: {error}", "See logs/."
    else:
        cause = f"No result yet: the job is in its phase {last}, begun {took} after its start."
        remedy = f"Run this again when it has ended; to follow it: {command}"
    return Report(run.resolve().name, folder_source(run), "NO RESULT", cause, remedy, checks=str(error))


def _unfinished(run: Path) -> str:
    """What a run's job still did, or why it failed, after it had measured; "" if it ended well, or is not ours."""
    phases = read_json_lines(run / "job/phases.jsonl")
    last = phases[-1]["phase"] if phases else "done"
    if last.startswith("failed"):
        return f" The job then failed: {last.partition(': ')[2].rstrip('.')}."
    return "" if last == "done" else f" The job is in its phase {last}, or was ended in it."


def _cause(result: RunResult) -> str:
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


def _remedy(result: RunResult) -> str:
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


def _proviso(result: RunResult) -> str:
    """Why a VALID run cannot be submitted, in some words."""
    source = result.verdict.claim.source
    if not result.verdict.valid or source == "published":
        return ""
    if source != "measured":
        return f"not submittable: {source}"
    return "not submittable yet" if result.verdict.not_judged else ""


def _limits_note(result: RunResult) -> str:
    verdict = result.verdict
    said = [f"LoadGen's own word: {verdict.loadgen_valid or 'none'}."]
    scores = [f"accuracy_{name}" for name in result.scores]
    judged = [c for c in verdict.checks if c.name in scores and c.status in (PASS, FAIL)]
    words = [f"{c.name.removeprefix('accuracy_')} {c.figure:.6g} {SIGNS[c.status]}" for c in judged
             if not isinstance(c.figure, str)]  # fmt: skip
    said.append(f"Accuracy: {', '.join(words)}." if words else "Accuracy was not judged.")
    short = [*(c.name.replace("_", " ") for c in verdict.shortened), *verdict.claim.shortened]
    return " ".join([*said, f"Shortened on purpose: {', '.join(short)}." if short else ""]).strip()


def _what_served(result: RunResult) -> str:
    engine = result.files.parameters.get("engine")
    if engine in ("rehearsal", "trtllm"):
        dynamo = result.files.parameters.get("orchestrator") == "dynamo"
        return f"disaggregated TensorRT-LLM{' under Dynamo' if dynamo else ''}"
    return "an endpoint" if engine == "external" else ""


# -- tiles and bars


def _tiles(result: RunResult, row: dict) -> Iterable[tuple[str, str, str]]:
    per_gpu, gpus, nodes = (row[n] for n in ("completed_tokens_per_s_per_gpu", "accelerators_total", "nodes"))
    yield (
        _short(row["completed_tokens_per_s"]),
        "tokens/s",
        f"{_short(per_gpu)} per GPU" if per_gpu > 0 else "",
    )
    completed, offered = row["samples_per_s"], row["target_qps"]
    share = f"of {offered:g} offered ({100 * completed / offered:.0f} %)" if offered > 0 else ""
    yield _short(completed), f"{'samples' if row['scenario'] == 'Offline' else 'queries'}/s completed", share
    if gpus > 0:
        on = f" on {_count(int(nodes), 'node')}" if nodes > 0 else ""
        yield f"{gpus:.0f}", f"GPUs{on}", topology_words(result)
    else:
        yield "?", "GPUs", "the folder does not say how many"
    yield _compared(result, per_gpu)


def _compared(result: RunResult, per_gpu: float) -> tuple[str, str, str]:
    """Tokens/s/GPU as a share of the best published one, or why there is none."""
    claim, rates = result.verdict.claim, published_table(result.verdict.claim.scenario)
    best = rates["completed_tokens_per_s_per_gpu"].max()
    reasons = [claim.source] if claim.source in ("rehearsed", "simulated") else []
    reasons += claim.shortened
    reasons += (
        [] if claim.model == "llama3.1-405b" and len(rates) else ["nothing published of its kind is here"]
    )
    reasons += [] if per_gpu > 0 else ["GPUs unknown"]
    if reasons:
        return "not compared", "with published results:", "; ".join(reasons)
    invalid = "" if result.verdict.valid else "; but this run is INVALID"
    return (
        f"{100 * per_gpu / best:.0f} %",
        "of the best published tokens/s/GPU",
        f"{best:.1f} in {claim.scenario}, v5.1{invalid}",
    )


def topology_words(result: RunResult, joint: str = " + ", spelled: bool = True) -> str:
    """`4 x TP4 context + 1 x TP4 generation`, by the run's parameters; what system it was where there are none."""
    p = result.files.parameters
    parts = []
    for role, word in (("ctx", " context"), ("gen", " generation")):
        if count := p.get(f"num_{role}_servers"):
            pp = p.get(f"{role}_pp_size") or 1
            parts.append(
                f"{count} x TP{p[f'{role}_tp_size']}{f' PP{pp}' if pp > 1 else ''}{word if spelled else ''}"
            )
    return joint.join(parts) or str(result.files.system.get("system_name") or "")


def _bars(checks: tuple) -> Iterable[Bar]:
    """TTFT, TPOT, queries over a limit, duration: one scale, the limit at the same place."""
    by_name = {check.name: check for check in checks}
    for name, words in (("ttft_p99", "Time to first token"), ("tpot_p99", "Time per output token")):
        if (check := by_name.get(name)) and check.limit:
            filled = min(1.0, MARK * check.figure / check.limit)
            figure = f"{_short(check.figure)} ms"
            yield Bar(words, filled, MARK, check.status, figure, f"of {check.limit:,.0f}")
    counts = [c for c in checks if c.name.startswith("early_stopping_") and c.unit != "queries" and c.unit]
    if counts:
        worst = max(counts, key=lambda c: (c.status == FAIL, c.figure - c.limit))
        scale = worst.limit / MARK if worst.limit else max(worst.figure, 1)
        known = "most" not in worst.unit or not worst.figure
        figure = f"{worst.figure:,.0f}" if known else f"at most {worst.figure:,.0f}"
        figure = (
            figure if worst.status != FAIL or "least" not in worst.unit else f"at least {worst.figure:,.0f}"
        )
        mark = MARK if worst.limit else 0.0
        filled = min(1.0, worst.figure / scale)
        yield Bar("Queries over a limit", filled, mark, worst.status, figure, f"({worst.limit:,.0f} allowed)")
    if (check := by_name.get("duration")) and check.limit:
        filled = min(1.0, MARK * check.figure / check.limit)
        short = check.status == SHORTENED
        limit = f"of {check.limit:,.0f}, short on purpose" if short else f"of at least {check.limit:,.0f}"
        yield Bar("Duration", filled, MARK, check.status, f"{check.figure:,.0f} s", limit)


def _line(result: RunResult, row: dict, bars: tuple[Bar, ...]) -> str:
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
        f"{_short(row['completed_tokens_per_s'])} tok/s",
        f"TTFT {ttft.figure / 1e3:.2f}/{ttft.limit / 1e3:g} s {SIGNS[ttft.status]}" if ttft else "",
        f"TPOT {_short(tpot.figure)}/{tpot.limit:g} ms {SIGNS[tpot.status]}" if tpot else "",
        commit[:7],
    ]
    return " · ".join(filter(None, parts))


# -- other runs


def beside_rows(row: dict, others: Iterable[Path]) -> Iterable[dict]:
    """This run, others that can be read, and the published ones of its scenario: what one row of the table says."""
    yield {**_cells(row), "name": "this run", "this": True}
    for other, theirs in itertools.islice(_readable(others), MOST_BESIDE):
        yield {**_cells(theirs), **_same(row, theirs), "name": Path(other).resolve().name}
    published = published_table(row["scenario"])
    if row["model"] == "llama3.1-405b" and len(published):
        rate = "completed_tokens_per_s_per_gpu"
        best = published.sort_values(rate, ascending=False).iloc[0]
        eight = published[
            published["accelerator"].str.contains("B200-SXM") & (published["accelerators_total"] == 8)
        ]
        gpu = best["accelerator"].removeprefix("NVIDIA ").split("-")[0]
        name = f"best per GPU of v5.1: {best['submitter']}, {best['accelerators_total']} x {gpu}"
        yield {**_cells(best.to_dict()), "name": name, "published": True}
        if len(eight) > 1:
            middle = eight.median(numeric_only=True).to_dict() | {"source": "published", "valid": True}
            name = f"8 x B200 of v5.1, median of {len(eight)}"
            yield {**_cells(middle), "name": name, "published": True}


def _readable(runs: Iterable[Path]) -> Iterable[tuple[Path, dict]]:
    for run in runs:
        with contextlib.suppress(DisaggError):  # not launched, failed or cut: it has no figures to set beside
            yield run, result_row(read_result(run))


def _same(row: dict, theirs: dict) -> dict:
    """`same` in place of a figure of theirs whose difference from this run's the noise covers."""
    names = {"completed_tokens_per_s": "rate", "ttft_p99_ms": "ttft", "tpot_p99_ms": "tpot"}
    found = compare(as_table([row | {"folder": "this"}, theirs]), "this")
    found = found[(found["word"] == "inside the noise") & found["figure"].isin(names)]
    same = {names[one.figure]: _same_words(one.difference_percent) for one in found.itertuples()}
    if row["accelerators_total"] != theirs["accelerators_total"]:
        same.pop("rate", None)
    return same | {"noise": True} if same else {}


def _same_words(percent: float) -> str:
    return f"same ({percent:+.1f} %)".replace("-", "−") if abs(percent) >= 0.05 else "same"


def _cells(row: dict) -> dict:
    """The figures of a row of the table as text, and which are over their limits."""
    limits = {name: row.get(f"{name}_limit_ms") or math.nan for name in ("ttft", "tpot")}
    return {
        **dict.fromkeys(("this", "published", "noise"), False),
        "source": row["source"],
        "sign": "✓" if row["valid"] else "✗",
        "gpus": f"{row['accelerators_total']:.0f}" if row["accelerators_total"] > 0 else "-",
        "qps": f"{row['target_qps']:g}" if row["target_qps"] > 0 else "-",
        "rate": _short(row["completed_tokens_per_s_per_gpu"]),
        **{name: _short(row[f"{name}_p99_ms"]) for name in limits},
        "over": [name for name, limit in limits.items() if limit > 0 and row[f"{name}_p99_ms"] >= limit],
    }


# -- forms


@functools.cache
def _template():
    environment = Environment(
        loader=PackageLoader("disagg_lib.sharing", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _text_lines(report: Report, width: int) -> Iterable[str]:
    def wrapped(text: str, indent: str = "") -> list[str]:
        return textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    yield from wrapped(
        f"{report.sign} {report.word} ({'; '.join(filter(None, [report.pill, report.proviso]))})"
    )
    yield from wrapped(report.cause)
    yield from wrapped(report.remedy)
    if not report.tiles:
        return
    yield ""
    for figure, what, more in report.tiles:
        yield from textwrap.wrap(
            f"{figure} {what}{'' if what.endswith(':') else ','} {more}",
            width,
            initial_indent="  ",
            subsequent_indent="    ",
        )
    names = max((len(bar.name) for bar in report.bars), default=0)
    for bar in report.bars:
        cells = round(20 * bar.filled)
        drawn = "".join("|" if n == round(20 * bar.mark) else "#" if n < cells else "." for n in range(21))
        yield f"  {bar.name:{names}} {drawn} {bar.figure} {bar.limit} {bar.sign}".rstrip()
    yield from wrapped(report.limits_note, "  ")
    yield ""
    yield from _at_dots(report.line, width)


def _markdown_parts(report: Report) -> Iterable[str]:
    yield f"# {report.sign} {report.title}"
    rows = [(f"**{report.sign} {report.word}**", f"**{report.cause}** {report.remedy}")]
    rows += [(what.rstrip(":"), f"**{figure}** {more}") for figure, what, more in report.tiles]
    rows += [(bar.name, f"**{bar.figure}** {bar.limit} {bar.sign}") for bar in report.bars]
    head, *rest = (f"| {name} | {words} |" for name, words in rows)
    yield f"**source: {report.source}.** {report.eyebrow}; {report.pill}."
    yield "\n".join([head, "|---|---|", *rest])
    yield report.limits_note
    yield f"`{report.line}`" if report.line else ""
    yield f"<details><summary>Every check, in full</summary>\n\n```\n{report.checks}\n```\n\n</details>"


def _at_dots(line: str, width: int) -> Iterable[str]:
    """A line cut where a dot stands, so that none is longer than `width`."""
    first, *rest = line.split(" · ")
    for part in rest:
        if len(f"{first} · {part}") > width:
            yield first
            first = part
        else:
            first += f" · {part}"
    yield first


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{_short(ms)} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _day(moment: str) -> str:
    """`2026-11-30T22:21:33Z` as `30 Nov 2026`."""
    try:
        return f"{datetime.fromisoformat(moment):%-d %b %Y}"
    except ValueError:
        return ""
