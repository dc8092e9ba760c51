"""What `plan`, `simulate` and `calibrate` print: the model's predictions as tables, with what they depend on beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from disagg_lib.experiment import Experiment, load_recorded
from disagg_lib.serving.calibrate import (
    Calibration,
    CalibrationError,
    calibrate,
    observe,
    read_calibration,
    write_calibration,
)
from disagg_lib.serving.lengths import built_in_lengths, read_lengths_csv, shorten_outputs
from disagg_lib.serving.loadgen_rules import Load, draw_load
from disagg_lib.serving.plan import (
    PlanRow,
    aggregated_alternative,
    check_saturation,
    deployment_of,
    plan,
    qps_over_seeds,
)
from disagg_lib.serving.simulate import simulate, summarise

PROMPT_CVS = (
    0.45,
    0.35,
    0.55,
)  # the built-in spread of prompt lengths first, then the two reported beside it


@dataclass(frozen=True)
class Model:
    """What a prediction rests on besides the experiment: lengths (None: the built-in shapes) and calibration."""

    lengths: np.ndarray | None = None
    calibration: Calibration = Calibration()

    @classmethod
    def read(cls, lengths_file: str | None = None, calibration_file: str | None = None) -> "Model":
        """From the files of the command line."""
        return cls(
            read_lengths_csv(Path(lengths_file)) if lengths_file else None,
            read_calibration(Path(calibration_file)) if calibration_file else Calibration(),
        )

    def spreads(self) -> list[tuple[str, np.ndarray]]:
        """(name, lengths) of what is reported side by side."""
        if self.lengths is not None:
            return [("given", self.lengths)]
        return [(f"cv {cv}", built_in_lengths(cv=cv)) for cv in PROMPT_CVS]


def layout_of(e: Experiment) -> str:
    """E.g. `4 x TP4 ctx + 1 x TP4 gen`."""
    pp = f" PP{e.ctx_pp_size}" if e.ctx_pp_size > 1 else ""
    return f"{e.num_ctx_servers} x TP{e.ctx_tp_size}{pp} ctx + {e.num_gen_servers} x TP{e.gen_tp_size} gen"


def _load(e: Experiment, seed: int) -> Load:
    if e.shortened:
        return draw_load(e.server_target_qps, seed, 0.001, e.rehearsal_queries, equal_issue=False)
    return draw_load(e.server_target_qps, seed)


def simulate_table(e: Experiment, seeds: Sequence[int], model: Model) -> pd.DataFrame:
    """One row a prompt-length spread and seed, at the experiment's server_target_qps; a rehearsal is simulated as shortened.

    Raises
    ------
    PlanError : the QPS is beyond what the context servers can keep up with.
    """
    deployment = model.calibration.apply(deployment_of(e))
    rows = []
    for name, lengths in model.spreads():
        lengths = shorten_outputs(lengths, e.rehearsal_output_tokens) if e.shortened else lengths
        check_saturation(deployment, e.server_target_qps, lengths)
        for seed in seeds:
            row = summarise(simulate(deployment, _load(e, seed), lengths))
            loadgen_valid = "VALID" if row["valid"] else "INVALID"
            settings = {"topology": layout_of(e), "prompt_lengths": name, "seed": seed}
            rows.append(settings | row | {"loadgen_valid": loadgen_valid, "submittable": False})
    return pd.DataFrame(rows)


def format_simulation(table: pd.DataFrame) -> str:
    """Medians over seeds for a terminal, a line a spread of prompt lengths."""
    lines = [
        f"{table['topology'].iloc[0]} at {table['target_qps'].iloc[0]:g} queries/s; source: simulated, medians over seeds"
    ]
    heads = [
        "prompt lengths",
        "VALID",
        "margin",
        "binds",
        "TTFT p50 ms",
        "TTFT p99 ms",
        "TPOT p50 ms",
        "TPOT p99 ms",
        "tokens/s",
    ]
    rows = [heads]
    for name, part in table.groupby("prompt_lengths", sort=False):
        median = part.median(numeric_only=True)
        rows.append(
            [
                name,
                f"{int(part['valid'].sum())} of {len(part)}",
                f"{100 * median['margin']:+.1f} %",
                part["binds"].mode()[0],
                *(f"{median[c]:.0f}" for c in ("ttft_p50_ms", "ttft_p99_ms")),
                *(f"{median[c]:.1f}" for c in ("tpot_p50_ms", "tpot_p99_ms")),
                f"{median['completed_tokens_per_s']:.0f}",
            ]
        )
    return "\n".join(
        [
            *lines,
            *_columns(rows),
            "Limits: TTFT 4500 ms, TPOT 80 ms; margin: at the query that early stopping looks at.",
        ]
    )


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plan_row(row: PlanRow, rank: int | None) -> dict:
    values = row.as_dict()
    return {
        "topology": values.pop("layout"),
        "rank": rank,
        **values,
        "loadgen_valid": "VALID" if row.p_valid >= 0.5 else "INVALID",
        "valid": row.p_valid >= 0.5,
        "submittable": False,
    }


def plan_table(
    e: Experiment, gpus: int, model: Model, seeds: Sequence[int] = range(8)
) -> tuple[pd.DataFrame, str]:
    """Rank topologies for a budget; returns (one row a topology, notes: other prompt spreads, aggregated servers, the choice).

    Raises
    ------
    PlanError : nothing fits.
    """
    lengths = model.spreads()[0][1]
    ranked = plan(
        gpus, lengths=lengths, gpus_per_node=e.gpus_per_node, calibration=model.calibration, seeds=seeds
    )
    table = pd.DataFrame([_plan_row(row, rank) for rank, row in enumerate(ranked, 1)])
    best = ranked[0]
    notes = []
    for name, other in model.spreads()[1:]:
        qps = qps_over_seeds(best.deployment, other, seeds[:4], guess=best.target_qps)
        notes.append(
            f"With {name} of the prompt length instead of 0.45: {np.median(qps):.2f} [{qps.min():.2f}, {qps.max():.2f}] queries/s"
        )
    together = aggregated_alternative(gpus, lengths=lengths, seeds=seeds[:4])
    ratio = best.target_qps / together.target_qps if together.target_qps else float("inf")
    notes.append(
        f"Aggregated ({together.layout}): {together.target_qps:.2f} queries/s; disaggregation gives {ratio:.2f} times that, uncalibrated"
    )
    fitted = ", ".join(model.calibration.fitted_on) or "nothing: factors 1"
    notes.append(f"Calibrated on {fitted}. The choice, as a params file:")
    notes += [f"    {name}: {value}" for name, value in best.params().items()]
    return table, "\n".join(notes)


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """What a person reads of `plan_table`: queries/s are the highest that stay VALID, median and range over seeds."""
    rows = [
        {
            "topology": row["topology"],
            "idle": row["gpus_idle"],
            "target_qps": f"{row['target_qps']:.2f} [{row['target_qps_low']:.2f}, {row['target_qps_high']:.2f}]",
            "advised": f"{row['recommended_qps']:.2f}",
            "P(VALID)": f"{row['p_valid']:.2f}",
            "tokens/s/GPU": f"{row['tokens_per_s_per_gpu']:.0f}",
            "TTFT p99 ms": f"{row['ttft_p99_ms']:.0f}",
            "TPOT p99 ms": f"{row['tpot_p99_ms']:.1f}",
            "binds": row["binds"],
            "one ctx less": f"{row['without_context_server_qps']:.2f}",
            "one gen less": f"{row['without_generation_server_qps']:.2f}",
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))


def format_plan(table: pd.DataFrame) -> str:
    """The ranking for a terminal."""
    head = "source: simulated; queries/s, the highest that stay VALID, median [range] over seeds"
    return f"{head}\n{ranking(table).to_string()}"


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
        observed.append(observe(run, deployment_of(e), e.server_target_qps / scale, scale))
    if out.exists():
        raise CalibrationError(f"{out} is there already, and nothing is overwritten. Choose another name.")
    fitted, rows = calibrate(observed)
    write_calibration(fitted, out)
    lines = [
        f"context_factor {fitted.context_factor:.4f}, generation_factor {fitted.generation_factor:.4f}: {out}"
    ]
    for row in rows:
        used = "fitted on itself: the only run" if row["used_in_fit"] else "predicted from the other runs"
        for word in ("before", "after"):
            errors = ", ".join(
                f"{name.removeprefix(word + '_').removesuffix('_ms')} {100 * value:+.1f} %"
                for name, value in row.items()
                if name.startswith(word)
            )
            lines.append(f"{row['name']} ({used}) {word}: {errors}")
    return "\n".join(lines)
