"""Prediction against measurement: one run's quantiles side by side, and the ledger of a site's runs (results/ledger.csv)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..errors import CalibrationError, DisaggError
from ..experiment.loading import load_recorded
from ..experiment.parameters import Experiment
from ..results.style import BLUE, INK, ORANGE, new_figure, set_title
from .calibrate import FIGURES, Observed, observe_record, predict
from .figures import as_image
from .plan import deployment_of, layout_of, limits_of

KEPT = ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def observed(run_dir: Path, e: Experiment | None = None) -> Observed:
    """A run folder as `calibrate` takes it: its own layout, recorded arrivals and lengths."""
    e = e or load_recorded(run_dir)
    scale = e.rehearsal_time_scale if e.engine == "rehearsal" else 1.0
    return observe_record(run_dir, deployment_of(e), e.server_target_qps * scale, scale)


def compare(run_dir: Path, e: Experiment | None = None) -> pd.DataFrame:
    """TTFT and TPOT quantiles of a run: measured, predicted for its own parameters, load and lengths, and which side of the limits.

    Returns
    -------
    one row a figure: figure, measured_ms, predicted_ms, error, limit_ms, agrees (both on one side of the limit). A rehearsal's times are the
    model's: divided by its time scale.

    Raises
    ------
    CalibrationError : the run kept no record of its queries, or some failed.
    """
    e = e or load_recorded(run_dir)
    run, limits = observed(run_dir, e), limits_of(e)
    figures = pd.Series(FIGURES)
    measured, predicted = figures.map(run.figures), figures.map(predict(run))
    limit = figures.map(lambda figure: limits[figure.startswith("tpot")])
    values = {"figure": figures, "measured_ms": measured, "predicted_ms": predicted}
    values |= {"error": predicted / measured - 1, "limit_ms": limit}
    values["agrees"] = (measured <= limit) == (predicted <= limit)
    return pd.DataFrame(values).assign(predicted_source="simulated")


def figure_comparison(table: pd.DataFrame, source: str) -> Figure:
    """The quantiles side by side, TTFT and TPOT, with the limits."""
    figure, axes = new_figure(8, 3.4, ncols=2)
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        part = table[table["figure"].str.startswith(name)]
        labels = part["figure"].str.extract(r"_(p\d+)_")[0]
        axis.plot(labels, part["measured_ms"], "o-", color=BLUE, label=source)
        axis.plot(labels, part["predicted_ms"], "s--", color=ORANGE, label="simulated")
        axis.axhline(part["limit_ms"].iloc[0], color=INK, linewidth=0.8)
        axis.set(xlabel="quantile of the queries", ylabel=f"{name.upper()} (ms)", ylim=(0, None))
    axes[0].legend(frameon=False)
    set_title(figure, "Prediction against measurement", f"{source}, simulated")
    return figure


def read_ledger(path: Path) -> pd.DataFrame:
    """All runs of the ledger; empty before the first.

    Raises
    ------
    CalibrationError : the file is not a ledger.
    """
    if not Path(path).exists():
        return pd.DataFrame(columns=["run"])
    try:
        return pd.read_csv(path, dtype={"run": str}).astype({"run": str})
    except (OSError, KeyError, ValueError) as error:
        fix = "Move it away; 05 begins a new one."
        raise CalibrationError(f"{path}: cannot be read as a ledger ({error}). {fix}") from None


def record(path: Path, run_dir: Path, e: Experiment, table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Write a run's row into the ledger, in place of an earlier one of the same run, and return the whole of it."""
    row = {"run": Path(run_dir).name, "source": source, "layout": layout_of(deployment_of(e))}
    row |= {"system": e.gpu_system, "stack": Path(e.serving_stack).name, "target_qps": e.server_target_qps}
    by_figure = table.set_index("figure")
    for figure in KEPT:
        for word in ("predicted_ms", "measured_ms", "error"):
            row[f"{word.removesuffix('_ms')}_{figure}"] = round(by_figure.loc[figure, word], 4)
    before = read_ledger(path)
    ledger = pd.concat([before[before["run"] != row["run"]], pd.DataFrame([row])], ignore_index=True)
    draft = Path(path).with_suffix(".draft")
    ledger.to_csv(draft, index=False)
    draft.replace(path)
    return ledger


def compared(run_dir: Path, e: Experiment) -> list:
    """What 05 shows: the figure and the table, written into the ledger beside the run; or the reason why there is nothing to compare."""
    if e.engine == "external":
        return ["An external server has no layout to predict from."]
    try:
        table = compare(run_dir, e)
    except DisaggError as error:
        return [f"Not compared: {error}"]
    source = "rehearsed" if e.engine == "rehearsal" else "measured"
    record(Path(run_dir).parent / "ledger.csv", run_dir, e, table, source)
    rounded = table.round({"measured_ms": 1, "predicted_ms": 1, "error": 3})
    return [as_image(figure_comparison(table, source)), rounded]
