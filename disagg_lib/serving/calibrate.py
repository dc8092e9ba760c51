"""Fit a stack's constants on measured runs, so that the fit cannot diverge.

Each run is inverted first: two bisections, each of a figure that only grows with its factor, find how long its steps really took
(`invert`). Then the constants of the stack are solved from those step times, which is linear (`solve`). Source: facts on the
serving model.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import CalibrationError
from ..results.found import find_logs
from ..results.logs import read_run
from ..results.rounds import load_rules
from . import rules
from .latency import read_table
from .lengths import LENGTHS, length_draws
from .loadgen_rules import Load, official_load, percentile
from .simulate import Deployment, simulate
from .stacks import Stack

QUANTILES = (50, 90, 95, 97, 99)
FIGURES = tuple(f"{name}_p{q}_ms" for name in ("ttft", "tpot") for q in QUANTILES)
SHOWN = tuple(f"{name}_p{q}_ms" for name in ("ttft", "tpot") for q in (50, 90, 97, 99))
FITTED_TTFT = tuple(f"ttft_p{q}_ms" for q in (50, 90, 95, 97))
BRACKET = 0.4, 2.5  # of a step's factor; what lies outside is a finding, no fit
LEAST_TTFT_MS = 200.0  # below, the constant of about 10 ms a request bends the factors
DRAWS = 3  # of the lengths, in a fit; a prediction takes more


@dataclass(frozen=True)
class Observed:
    """A run to compare with, its figures in ms as far as known (`FIGURES`); `lengths` as recorded, or draws of the built-in shapes."""

    name: str
    deployment: Deployment
    load: Load
    figures: dict[str, float]
    lengths: tuple[np.ndarray, ...] = field(repr=False)


def figures_of(ttft_ms: np.ndarray, tpot_ms: np.ndarray) -> dict[str, float]:
    """FIGURES of a run's queries."""
    values = {"ttft": ttft_ms, "tpot": tpot_ms}
    return {f"{name}_p{q}_ms": percentile(v, q / 100) for name, v in values.items() for q in QUANTILES}


def observe_record(
    run_dir: Path, deployment: Deployment, target_qps: float, time_scale: float = 1.0
) -> Observed:
    """A run of the project's own client, with the arrivals and lengths that it recorded in job/queries_performance.csv.

    Times are divided by `time_scale`, so that a rehearsal at another pace compares in the model's time.

    Raises
    ------
    CalibrationError : no such record, one that is cut short, or one with failed requests.
    """
    path = Path(run_dir) / "job" / "queries_performance.csv"
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        failed = sum(row["status"] != "ok" for row in rows)
        if failed or not rows:
            raise CalibrationError(
                f"{path}: {failed} of {len(rows)} requests failed; only a complete run can be compared. Take another run."
            )
        columns = ("issue_s", "late_ms", "ttft_ms", "latency_ms", "input_tokens", "output_tokens")
        issue, late, ttft, latency, inputs, outputs = np.array(
            [[float(row[c] or 0) for c in columns] for row in rows]
        ).T
    except (OSError, KeyError, ValueError, TypeError) as error:
        what = "the client's record of queries"
        raise CalibrationError(f"{path}: cannot be read as {what} ({error!r}).") from None
    lengths = np.empty(len(rows), LENGTHS)
    lengths["input_tokens"], lengths["output_tokens"] = inputs, outputs
    arrivals = issue - late / 1e3
    order = np.argsort(arrivals, kind="stable")
    load = Load(target_qps, (arrivals - arrivals.min())[order] / time_scale, order)
    figures = figures_of((ttft + late) / time_scale, (latency - ttft) / (outputs - 1) / time_scale)
    return Observed(Path(run_dir).name, deployment, load, figures, (lengths,))


def observe_log(folder: Path, deployment: Deployment, draws: int = DRAWS) -> Observed:
    """A LoadGen log of scenario Server with a round's seeds: its load is known to the ns, its lengths by shape and mean.

    Raises
    ------
    LogError, CalibrationError : no such log, other seeds, failed queries, or no token figures.
    """
    run = read_run(find_logs(folder).performance)
    claimed = [name for name, r in load_rules()["rounds"].items() if tuple(r["seeds"]) == tuple(run.seeds)]
    if not claimed or run.loadgen_scenario != "Server" or run.error_count:
        raise CalibrationError(
            f"{folder}: scenario {run.loadgen_scenario}, {run.error_count} errors, seeds of"
            f" {claimed[0] if claimed else 'no round'}; needed is a Server run without errors on a round's seeds."
        )
    row = {
        "target_qps": run.target_qps,
        "min_duration_ms": run.min_duration_ms,
        "min_query_count": run.detail["effective_min_query_count"],
        "tokens_per_sample": run.completed_tokens_per_s / run.samples_per_s,
    }
    names = {"ttft": "first_token_{}.00_percentile_latency", "tpot": "time_per_output_token_{}.00_percentile"}
    for q in QUANTILES:
        for name, key in names.items():
            row[f"{name}_p{q}_ms"] = run.detail.get(f"result_{key.format(q)}_ns", math.nan) / 1e6
    return observe_row(row, claimed[0], deployment, Path(folder).name, draws)


def observe_row(row: dict, claimed: str, deployment: Deployment, name: str, draws: int = DRAWS) -> Observed:
    """A published row: target_qps, min_duration_ms, figures as columns; tokens_per_sample and min_query_count if known."""
    least = row.get("min_query_count", 100)
    load = official_load(claimed, row["target_qps"], int(row["min_duration_ms"]), int(least))
    figures = {key: float(row[key]) for key in FIGURES if row.get(key, math.nan) > 0}
    if not {"ttft_p50_ms", "tpot_p50_ms"} <= set(figures):
        raise CalibrationError(f"{name}: no ttft_p50_ms and tpot_p50_ms to fit on. Is it an Offline run?")
    return Observed(name, deployment, load, figures, length_draws(draws, row.get("tokens_per_sample")))


def under(run: Observed, stack: Stack) -> Observed:
    """The run as the stack serves it; its router and policies stay what the run's configuration says."""
    stack.check_system(run.deployment.system)
    return replace(run, deployment=replace(run.deployment, stack=stack))


def predict(run: Observed) -> dict[str, float]:
    """Figures of a run as the model has them: the median over its draws of lengths."""
    runs = [simulate(run.deployment, run.load, lengths) for lengths in run.lengths]
    rows = [figures_of(r.ttft_ms, r.tpot_ms) for r in runs]
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def relative_errors(run: Observed) -> dict[str, float]:
    """Predicted / measured - 1, for each figure that was measured."""
    predicted = predict(run)
    return {name: predicted[name] / measured - 1 for name, measured in run.figures.items()}


def _bisect(run: Observed, factor: str, names: Sequence[str], bracket=BRACKET) -> Observed:
    """The run with the factor at which the mean logarithmic error of these figures is 0; CalibrationError beyond the bracket."""
    stack = run.deployment.stack

    def error(value: float) -> float:
        errors = relative_errors(under(run, replace(stack, **{factor: value})))
        return sum(math.log1p(errors[name]) for name in names if name in errors)

    low, high = bracket
    if error(low) > 0 or error(high) < 0:
        if bracket != BRACKET:
            return _bisect(run, factor, names)
        role = factor.removesuffix("_factor")
        raise CalibrationError(
            f"{run.name}: no {role} step time within {low:g} to {high:g} of stack {stack.name}'s reaches its {names[0]}. Are layout,"
            " system, router and lengths those of the run?"
        )
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if error(middle) > 0 else (middle, high)
    return under(run, replace(stack, **{factor: math.sqrt(low * high)}))


def invert(run: Observed, base: Stack) -> Observed:
    """The run with the two factors on `base` that give its TPOT p50 and, on the whole, its TTFT quantiles.

    Raises
    ------
    CalibrationError : a run that no factor reaches, or one whose TTFT is too short to fit.
    """
    if run.figures["ttft_p50_ms"] < LEAST_TTFT_MS:
        raise CalibrationError(
            f"{run.name}: TTFT p50 is {run.figures['ttft_p50_ms']:.0f} ms; below {LEAST_TTFT_MS:g} ms a request's constant of about 10 ms"
            " bends the fit. Take a run with longer prompts or at a higher QPS."
        )
    found = under(run, base)
    fits = (("generation_factor", ["tpot_p50_ms"], 1), ("context_factor", FITTED_TTFT, DRAWS))
    for width in (None, 1.04):  # the second time from near the first
        for factor, names, draws in fits:
            near = getattr(found.deployment.stack, factor)
            bracket = (near / width, near * width) if width else BRACKET
            some = replace(found, lengths=run.lengths[:draws])  # TPOT hardly depends on the draw
            found = _bisect(some, factor, names, bracket)
    return replace(found, lengths=run.lengths)


def _context_parts(d: Deployment, prompt_tokens: float) -> tuple[float, float]:
    """ms of compute with attention, and of communication, that a prompt of this length takes by the table."""
    t, group = read_table(d.system, d.context.tp, d.context.pp), d.context
    compute = comm = 0.0
    for done in range(0, math.ceil(prompt_tokens), group.max_num_tokens):
        chunk = min(prompt_tokens - done, group.max_num_tokens)
        compute += rules.interpolate(t.context_tokens, t.context_ms, chunk)
        compute += rules.interpolate_grid(t.attention_new, t.attention_past, t.attention_ms, chunk, done)
        comm += rules.interpolate(t.context_tokens, t.context_comm_ms, chunk)
    return compute, comm


def _generation_parts(d: Deployment, batch: float, mean_tokens: float) -> tuple[float, float]:
    """ms of compute with attention, and of communication, of a generation step by the table."""
    t, group = read_table(d.system, d.generation.tp, d.generation.pp), d.generation
    size = rules.captured_batch(math.ceil(batch), group.cuda_graph_sizes, group.cuda_graph_padding) or batch
    attention = rules.interpolate_grid(t.kv_batch, t.kv_length, t.kv_ms, batch, mean_tokens)
    both = t.generation_ms, t.generation_comm_ms
    compute, comm = (rules.interpolate(t.generation_batch, ms, size) for ms in both)
    return compute + d.stack.generation_attention * attention, comm


def step_times(run: Observed) -> dict[str, float]:
    """What an inverted run's steps are made of (ms), and what they must take in all to give its figures (`_needed`)."""
    d, lengths = run.deployment, run.lengths[0]
    simulated = simulate(d, run.load, lengths)
    mean_input, mean_output = lengths["input_tokens"].mean(), lengths["output_tokens"].mean()
    generating_s = (simulated.end_s - simulated.first_token_s).sum()
    # Without ramp-up and drain the batch is what Little's law says at the offered rate.
    batch = generating_s / (run.load.arrivals_s[-1] * d.generation.count)
    row, parts = {"batch": float(batch)}, {"context": _context_parts(d, float(mean_input))}
    parts["generation"] = _generation_parts(d, batch, float(mean_input + mean_output / 2))
    for role, (compute, comm) in parts.items():
        row |= {f"{role}_compute": float(compute), f"{role}_comm": float(comm)}
        row[f"{role}_needed"] = float(_step(d.stack, role, compute, comm))
    return row


def _step(stack: Stack, role: str, compute: float, comm: float) -> float:
    if role == "context":
        return stack.context_factor * (compute + stack.b_context * comm)
    return stack.generation_factor * (compute + stack.b_generation * comm + stack.host_ms)


def solve(steps: Sequence[dict[str, float]], base: Stack, fitted_on: Sequence[str]) -> Stack:
    """The constants of a stack from step times; b_generation keeps its ratio to b_context, host_ms takes the rest.

    One or two runs cannot tell communication that is hidden from host time: the ratio is the base stack's (1 without one).
    """
    s = pd.DataFrame(steps)
    comm, beyond = s["context_comm"], s["context_needed"] - s["context_compute"]
    b_context = max(0.0, float((comm * beyond).sum() / (comm**2).sum()))
    ratio = base.b_generation / base.b_context if base.b_context else 1.0
    rest = s["generation_needed"] - s["generation_compute"] - ratio * b_context * s["generation_comm"]
    base = replace(base, context_factor=1.0, generation_factor=1.0, fitted_on=tuple(fitted_on), residuals=())
    host_ms = max(0.0, float(rest.mean()))
    return replace(base, b_context=b_context, b_generation=ratio * b_context, host_ms=host_ms)


def calibrate(runs: Sequence[Observed], base: Stack, name: str) -> tuple[Stack, pd.DataFrame]:
    """Solve a stack on all runs, and show how well the constants of the *other* runs predict each one.

    Returns
    -------
    the stack, and one row a run: needed and table step times, the stack's residual in them, errors in-sample and left out
    (NaN for a single run, which has no others).

    Raises
    ------
    CalibrationError : no runs, aggregated ones, or one that cannot be reached.
    """
    if not runs or any(run.deployment.context is None for run in runs):
        raise CalibrationError(
            "needed are runs of context and generation servers; aggregated ones have one step for both."
        )
    steps, names, rows = [step_times(invert(run, base)) for run in runs], [run.name for run in runs], []
    systems = tuple(sorted({run.deployment.system for run in runs}))
    stack = replace(solve(steps, base, names), name=name, systems=systems)
    for k, (run, step) in enumerate(zip(runs, steps, strict=True)):
        row = {"run": run.name, **{key: round(value, 2) for key, value in step.items()}}
        for role in ("context", "generation"):
            found = _step(stack, role, step[f"{role}_compute"], step[f"{role}_comm"])
            row[f"{role}_residual"] = found / step[f"{role}_needed"] - 1
        others, their_names = steps[:k] + steps[k + 1 :], names[:k] + names[k + 1 :]
        left_out = solve(others, base, their_names) if others else None
        for word, with_ in (("in_sample", stack), ("left_out", left_out)):
            errors = relative_errors(under(run, replace(with_, systems=()))) if with_ else {}
            row |= {f"{word}_{figure}": errors.get(figure, math.nan) for figure in SHOWN}
        rows.append(row)
    said = "{run}: context {context_residual:+.2%}, generation {generation_residual:+.2%}"
    return replace(stack, residuals=tuple(said.format(**row) for row in rows)), pd.DataFrame(rows)


def calibration_text(stack: Stack, table: pd.DataFrame) -> str:
    """The constants, each run's step times, and its errors in-sample and left out, for a terminal."""
    factors = f"b_context {stack.b_context:.3f}, b_generation {stack.b_generation:.3f}"
    constants = f"{factors}, host_ms {stack.host_ms:.2f}, ttft_ms {stack.ttft_ms:g}"
    lines = [f"stack {stack.name}: {constants}"]
    for row in table.to_dict("records"):
        lines.append(f"{row['run']}, batch {row['batch']:.0f}")
        for role in ("context", "generation"):
            table_ms = f"{row[f'{role}_compute']:.1f} + communication {row[f'{role}_comm']:.1f}"
            needed = f"{row[f'{role}_needed']:.1f}, residual {row[f'{role}_residual']:+.1%}"
            lines.append(f"  {role} step ms: table {table_ms}, needed {needed}")
        for word in ("in_sample", "left_out"):
            errors = [f"{figure.removesuffix('_ms')} {row[f'{word}_{figure}']:+.1%}" for figure in SHOWN]
            known = [error for error in errors if "nan" not in error]
            lines.append(f"  {word.replace('_', ' ')}: " + (", ".join(known) or "the only run"))
    return "\n".join(lines)
