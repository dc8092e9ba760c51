"""Fit the serving model's two physical constants, context-step and generation-step factor, on measured runs.

A factor is the ratio of a real step's time to the latency table's: kernels of another release, host overhead, clocks. Two
constants for a stack, nothing for each row. Aggregated and disaggregated stacks are fitted apart. Without a calibration both are 1.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from ..errors import CalibrationError
from ..files import DATA
from .lengths import LENGTHS, built_in_lengths
from .loadgen_rules import Load, percentile, random_load
from .simulate import Deployment, simulate, summarise

FIGURES = ("ttft_mean_ms", "ttft_p50_ms", "tpot_mean_ms", "tpot_p50_ms")
SHIPPED = DATA / "calibration_aggregated.yaml"


@dataclass(frozen=True)
class Observed:
    """A measured run: what served, what was offered, and its FIGURES in ms.

    `load` is the recorded one if there is one; otherwise loads are drawn at target_qps, one for each seed.
    """

    name: str
    deployment: Deployment
    target_qps: float
    figures: dict[str, float]
    lengths: np.ndarray = field(default_factory=built_in_lengths, repr=False)
    load: Load | None = None


@dataclass(frozen=True)
class Calibration:
    """Two constants and the names of the runs that they were fitted on."""

    context_factor: float = 1.0
    generation_factor: float = 1.0
    fitted_on: tuple[str, ...] = ()

    def apply(self, deployment: Deployment) -> Deployment:
        """The deployment with these constants."""
        factors = {"context_factor": self.context_factor, "generation_factor": self.generation_factor}
        return replace(deployment, **factors)


UNCALIBRATED = Calibration()


def observe(run_dir: Path, deployment: Deployment, target_qps: float, time_scale: float = 1.0) -> Observed:
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
                f"{path}: {failed} of {len(rows)} requests failed; only a complete run can be compared."
            )
        columns = ("issue_s", "late_ms", "ttft_ms", "latency_ms", "input_tokens", "output_tokens")
        issue, late, ttft, latency, inputs, outputs = np.array(
            [[float(row[c] or 0) for c in columns] for row in rows]
        ).T
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{path}: cannot be read as the client's record of queries ({error!r})."
        ) from None
    lengths = np.empty(len(rows), LENGTHS)
    lengths["input_tokens"], lengths["output_tokens"] = inputs, outputs
    arrivals = issue - late / 1e3
    order = np.argsort(arrivals, kind="stable")
    load = Load(target_qps, (arrivals - arrivals.min())[order] / time_scale, order)
    values = {"ttft": (ttft + late) / time_scale, "tpot": (latency - ttft) / (outputs - 1) / time_scale}
    figures = {f"{name}_mean_ms": float(v.mean()) for name, v in values.items()}
    figures |= {f"{name}_p{p}_ms": percentile(v, p / 100) for name, v in values.items() for p in (50, 90, 99)}
    return Observed(Path(run_dir).name, deployment, target_qps, figures, lengths, load)


def predict(
    run: Observed, calibration: Calibration, seeds: Iterable[int] = (0,), names: Sequence[str] = FIGURES
) -> dict[str, float]:
    """Figures of a run as the model has them: the median over seeds (one recorded load needs no seeds)."""
    deployment = calibration.apply(run.deployment)
    loads = [run.load] if run.load is not None else [random_load(run.target_qps, seed) for seed in seeds]
    rows = [summarise(simulate(deployment, load, run.lengths)) for load in loads]
    return {name: float(np.median([row[name] for row in rows])) for name in names}


def relative_errors(
    run: Observed, calibration: Calibration, seeds: Iterable[int] = (0,), names: Sequence[str] = FIGURES
) -> dict[str, float]:
    """Predicted / measured - 1, for each name."""
    predicted = predict(run, calibration, seeds, names)
    return {name: predicted[name] / run.figures[name] - 1 for name in names}


def fit(runs: Sequence[Observed], seeds: Sequence[int] = range(100, 108)) -> Calibration:
    """Least squares of the logarithmic errors of FIGURES over all runs, by Gauss-Newton in the factors' logarithms.

    Raises
    ------
    CalibrationError : no runs, a figure missing or not positive, or aggregated and disaggregated runs together.
    """
    if not runs or len({run.deployment.context is None for run in runs}) != 1:
        raise CalibrationError(
            "fit needs at least one run, and aggregated and disaggregated runs are fitted apart."
        )
    for run in runs:
        bad = [name for name in FIGURES if not run.figures.get(name, 0) > 0]
        if bad:
            raise CalibrationError(f"{run.name}: no {', '.join(bad)} to fit on; is the run complete?")

    def errors(logs):
        c = Calibration(*np.exp(logs))
        return np.array([np.log1p(list(relative_errors(run, c, seeds).values())) for run in runs]).ravel()

    logs, step = np.zeros(2), 0.02
    for _ in range(12):
        now = errors(logs)
        slope = np.column_stack([(errors(logs + move) - now) / step for move in step * np.eye(2)])
        change = np.clip(np.linalg.lstsq(slope, -now)[0], -0.3, 0.3)
        logs = logs + change
        if np.abs(change).max() < 5e-4:
            break
    return Calibration(float(np.exp(logs[0])), float(np.exp(logs[1])), tuple(run.name for run in runs))


def calibrate(
    runs: Sequence[Observed], seeds: Sequence[int] = range(100, 108), score_seeds: Sequence[int] = range(16)
) -> tuple[Calibration, list[dict]]:
    """Fit on all runs, and show how well constants fitted on the *other* runs predict each one.

    Returns
    -------
    the calibration, and one row a run: name, used_in_fit (only a single run has no others), and before_/after_ + FIGURES:
    relative errors with factors 1 and with the fitted ones, on seeds that the fit did not see.
    """
    rows = []
    for run in runs:
        others = [other for other in runs if other is not run]
        held_out = fit(others or [run], seeds)
        before = relative_errors(run, Calibration(), score_seeds)
        after = relative_errors(run, held_out, score_seeds)
        rows.append(
            {"name": run.name, "used_in_fit": not others}
            | {f"before_{name}": value for name, value in before.items()}
            | {f"after_{name}": value for name, value in after.items()}
        )
    return fit(runs, seeds), rows


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the constants and the runs that they came from; never over an existing file."""
    content = {
        "fitted_on": list(calibration.fitted_on),
        "context_factor": round(calibration.context_factor, 4),
        "generation_factor": round(calibration.generation_factor, 4),
    }
    with Path(path).open("x") as file:
        yaml.safe_dump(content, file, sort_keys=False)


def read_calibration(path: Path = SHIPPED) -> Calibration:
    """Read a calibration file; the shipped one is for aggregated TensorRT engines only."""
    try:
        content = yaml.safe_load(Path(path).read_text())
        context, generation = float(content["context_factor"]), float(content["generation_factor"])
        if not (0 < min(context, generation) <= max(context, generation) < 100 and content["fitted_on"]):
            raise ValueError(f"factors {context:g} and {generation:g}")
        return Calibration(context, generation, tuple(content["fitted_on"]))
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CalibrationError(
            f"{path}: needs fitted_on, context_factor and generation_factor; cannot be used ({error!r})."
        ) from None
