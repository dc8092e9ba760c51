"""What `plan`, `simulate` and `calibrate` print: the model's predictions as tables, with what they depend on beside them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import CalibrationError
from ..experiment.loading import load_experiment, load_recorded
from ..experiment.parameters import Experiment
from . import calibrate, plan
from .lengths import data_set_lengths, shorten_outputs
from .loadgen_rules import Load, draw_load
from .simulate import Deployment, SimulatedRun, simulate, summarise

SEEDS = range(8)  # wherever the question is what a load gives: 02, 03, `simulate`
PROMPT_CVS = (0.45, 0.35, 0.55)  # the built-in spread of prompt lengths, and the two reported beside it


def _calibration(e: Experiment) -> calibrate.Calibration:
    return calibrate.read_calibration(e.calibration_file) if e.calibration_file else calibrate.UNCALIBRATED


def _deployment(e: Experiment) -> Deployment:
    return _calibration(e).apply(plan.deployment_of(e))


def spreads(e: Experiment) -> list[tuple[str, np.ndarray]]:
    """(name, lengths) of what is reported side by side: the lengths file, or the built-in shape with three spreads."""
    if e.lengths_file:
        return [(Path(e.lengths_file).name, data_set_lengths(e.lengths_file))]
    return [(f"cv {cv}", data_set_lengths(cv=cv)) for cv in PROMPT_CVS]


def _load(e: Experiment, seed: int) -> Load:
    if e.shortened:
        return draw_load(e.server_target_qps, seed, 0.001, e.rehearsal_queries, equal_issue=False)
    return draw_load(e.server_target_qps, seed)


def simulate_table(e: Experiment, seeds: Sequence[int]) -> pd.DataFrame:
    """One row a prompt-length spread and seed, at the experiment's server_target_qps; a rehearsal is simulated as shortened.

    Raises
    ------
    PlanError : the QPS is beyond what the servers can keep up with.
    """
    deployment = _deployment(e)
    rows = []
    for name, lengths in spreads(e):
        lengths = shorten_outputs(lengths, e.rehearsal_output_tokens) if e.shortened else lengths
        plan.check_saturation(deployment, e.server_target_qps, lengths)
        for seed in seeds:
            row = summarise(simulate(deployment, _load(e, seed), lengths))
            settings = {"topology": plan.layout_of(deployment), "prompt_lengths": name, "seed": seed}
            verdict = {"loadgen_valid": "VALID" if row["valid"] else "INVALID", "submittable": False}
            rows.append(settings | row | verdict)
    return pd.DataFrame(rows)


def highest_qps_table(e: Experiment, seeds: Sequence[int] = range(12)) -> pd.DataFrame:
    """One row: the highest QPS that stays VALID (whole runs, median [range] over seeds) for each spread, beside server_target_qps."""
    deployment = _deployment(e)
    row = {"GPUs": e.gpu_count, "topology": plan.layout_of(deployment)}
    for name, lengths in spreads(e):
        row[name] = _range(plan.qps_over_seeds(deployment, lengths, seeds, guess=e.server_target_qps))
    return pd.DataFrame([row | {"server_target_qps": e.server_target_qps, "source": "simulated"}])


def advice_table(seeds: Sequence[int] = range(12)) -> pd.DataFrame:
    """`highest_qps_table` of the original's topologies, beside what the original advises for them (server_target_qps there)."""
    files = [f"params/gb200_{gpus}gpu.yaml" for gpus in (20, 40, 60)]
    table = pd.concat(
        [highest_qps_table(load_experiment([file]), seeds) for file in files], ignore_index=True
    )
    return table.rename(columns={"server_target_qps": "the original's advice"})


def simulated_run(e: Experiment, seed: int = 0) -> SimulatedRun:
    """One run of the experiment, query by query, with the first of the prompt spreads."""
    lengths = spreads(e)[0][1]
    lengths = shorten_outputs(lengths, e.rehearsal_output_tokens) if e.shortened else lengths
    return simulate(_deployment(e), _load(e, seed), lengths)


def _range(qps: np.ndarray) -> str:
    return f"{np.median(qps):.2f} [{qps.min():.2f}, {qps.max():.2f}]"


def format_simulation(table: pd.DataFrame) -> str:
    """Medians over seeds for a terminal, a line a spread of prompt lengths."""
    rows = {}
    for name, part in table.groupby("prompt_lengths", sort=False):
        median = part.median(numeric_only=True)
        rows[name] = {
            "VALID": f"{int(part['valid'].sum())} of {len(part)}",
            "margin": f"{100 * median['margin']:+.1f} %",
            "binds": part["binds"].mode()[0],
            **{f"TTFT {p} ms": f"{median[f'ttft_{p}_ms']:.0f}" for p in ("p50", "p99")},
            **{f"TPOT {p} ms": f"{median[f'tpot_{p}_ms']:.1f}" for p in ("p50", "p99")},
            "tokens/s": f"{median['completed_tokens_per_s']:.0f}",
        }
    first = table.iloc[0]
    return (
        f"{first['topology']} at {first['target_qps']:g} queries/s; source: simulated, medians over seeds\n"
        f"{pd.DataFrame(rows).T.rename_axis('prompt lengths').reset_index().to_string(index=False)}\n"
        "Limits: TTFT 4500 ms, TPOT 80 ms; margin: at the query that early stopping looks at."
    )


def budget_of(e: Experiment, gpus: int | None = None) -> plan.Budget:
    """`gpus` (or plan_gpus, or what the parameters need), with the parameters' system, release, lengths and calibration."""
    return plan.Budget(
        gpus or e.plan_gpus or e.gpu_count, e.gpu_system, e.gpus_per_node, spreads(e)[0][1], calibration=_calibration(e),
        chunks_overlap=e.trtllm_dialect != "v5.1",
    )  # fmt: skip


def plan_table(ranked: Sequence[plan.PlanRow]) -> pd.DataFrame:
    """One row a topology with all its settings and figures, for a CSV file."""
    rows = []
    for rank, row in enumerate(ranked, 1):
        values, valid = row.as_dict(), row.p_valid >= 0.5
        verdict = {"loadgen_valid": "VALID" if valid else "INVALID", "valid": valid, "submittable": False}
        rows.append({"topology": values.pop("layout"), "rank": rank, **values, **verdict})
    return pd.DataFrame(rows)


def plan_notes(e: Experiment, ranked: Sequence[plan.PlanRow], seeds: Sequence[int] = range(4)) -> str:
    """What the ranking depends on (prompt spreads, PP, aggregated servers, calibration), and the choice as a params file."""
    best, notes = ranked[0], []
    gpus = best.gpus + best.gpus_idle
    for name, other in spreads(e)[1:]:
        qps = plan.qps_over_seeds(best.deployment, other, seeds, guess=best.target_qps)
        notes.append(f"With {name} of the prompt length instead of 0.45: {_range(qps)} queries/s")
    one_stage = next((row for row in ranked if row.deployment.context.pp == 1), None)
    if best.deployment.context.pp > 1:
        instead = f"{one_stage.layout} gives {one_stage.target_qps:.2f}" if one_stage else "nothing fits"
        notes.append(f"PP of context servers is unproven; measure it first. Without it {instead} queries/s")
    # The two stacks are calibrated apart: these servers keep factors 1.
    together = plan.aggregated_alternative(
        replace(budget_of(e, gpus), calibration=calibrate.UNCALIBRATED), seeds
    )
    ratio = best.target_qps / together.target_qps if together.target_qps else float("inf")
    notes.append(
        f"Aggregated ({together.layout}): {together.target_qps:.2f} queries/s; disaggregation gives {ratio:.2f} times that, uncalibrated"
    )
    fitted = ", ".join(_calibration(e).fitted_on) or "nothing: factors 1"
    notes.append(f"Calibrated on {fitted}. The choice, as a params file:")
    chosen = ({} if e.trtllm_dialect == "v5.1" else {"trtllm_dialect": e.trtllm_dialect}) | best.params()
    notes += [f"    {name}: {value}" for name, value in chosen.items()]
    return "\n".join(notes)


def ranking(ranked: Sequence[plan.PlanRow]) -> pd.DataFrame:
    """What a person reads of a plan: queries/s are the highest that stay VALID, median [range] over seeds."""
    rows = [
        {
            "topology": row.layout,
            "idle": row.gpus_idle,
            "target QPS": f"{row.target_qps:.2f} [{row.target_qps_low:.2f}, {row.target_qps_high:.2f}]",
            "P(VALID)": f"{row.p_valid:.2f}",
            "tokens/s/GPU": f"{row.tokens_per_s_per_gpu:.0f}",
            "TTFT p99 ms": f"{row.ttft_p99_ms:.0f}",
            "TPOT p99 ms": f"{row.tpot_p99_ms:.1f}",
            "binds": row.binds,
            "ctx tray down": f"{row.without_context_server_qps:.2f}",
            "gen tray down": f"{row.without_generation_server_qps:.2f}",
        }
        for row in ranked
    ]
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))


def calibrate_runs(runs: Sequence[Path], out: Path) -> str:
    """Fit on run folders, write the file, and say the errors before and after.

    Raises
    ------
    CalibrationError : a run that cannot be used, or the file is there already.
    """
    observed = []
    for run in runs:
        e = load_recorded(run)
        scale = e.rehearsal_time_scale if e.engine == "rehearsal" else 1.0
        observed.append(calibrate.observe(run, plan.deployment_of(e), e.server_target_qps * scale, scale))
    if out.exists():
        raise CalibrationError(f"{out} is there already, and nothing is overwritten. Choose another name.")
    fitted, rows = calibrate.calibrate(observed)
    calibrate.write_calibration(fitted, out)
    lines = [
        f"{out}: context_factor {fitted.context_factor:.4f}, generation_factor {fitted.generation_factor:.4f}"
    ]
    for row in rows:
        used = "fitted on itself: the only run" if row["used_in_fit"] else "predicted from the other runs"
        for word in ("before", "after"):
            errors = (f"{name[:-3]} {100 * row[f'{word}_{name}']:+.1f} %" for name in calibrate.FIGURES)
            lines.append(f"{row['name']} ({used}) {word}: {', '.join(errors)}")
    return "\n".join(lines)
