"""What `calibrate` is told to fit on: run folders, LoadGen logs with a params file, published rows with one."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..errors import CalibrationError
from ..experiment.loading import load_experiment
from ..files import DATA
from .calibrate import Observed, calibrate, calibration_text, observe_log, observe_row
from .ledger import observed, read_ledger
from .plan import deployment_of
from .stacks import read_stack, write_stack

Pairs = Sequence[tuple[str, str]]  # (folder or row, params file)


def runs_of_ledger(path: Path) -> list[str]:
    """Names of the measured runs in the ledger; CalibrationError if there are none."""
    ledger = read_ledger(path)
    measured = ledger[ledger["source"] == "measured"]["run"].tolist() if len(ledger) else []
    if not measured:
        raise CalibrationError(
            f"{path}: no measured run in it. Name runs, or let 05_analysis write a measured one into it."
        )
    return measured


def _published_row(name: str, params: str) -> Observed:
    """A row of the shipped tables of published results, or of another of that form: FILE.csv:NAME, of the experiment's round."""
    e, where = load_experiment([params]), f"--published {name}"
    path, _, part = name.rpartition(".csv:")
    shipped = {f.stem.removeprefix("published_"): f for f in sorted(DATA.glob("published_v*.csv"))}
    files = {e.round: Path(f"{path}.csv")} if path else shipped
    try:
        tables = [pd.read_csv(file, comment="#").assign(round=claimed) for claimed, file in files.items()]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{where}: cannot be read as a table of results ({error}).") from None
    table = pd.concat(tables)
    found = table[table["log_path"].str.contains(part, regex=False)]
    if len(found) != 1:
        some = ", ".join(found["log_path"].head(3)) or "none"
        what = f"{len(found)} rows have it in their log_path ({some})"
        raise CalibrationError(f"{where}: {what}; needed is one.")
    row = found.iloc[0].to_dict() | ({"min_query_count": e.min_query_count} if e.min_query_count else {})
    return observe_row(row, row["round"], deployment_of(e), part)


def calibrate_runs(folders: Sequence[Path], logs: Pairs, published: Pairs, base: str, out: Path) -> str:
    """Fit on all of them, write the stack file, and say the step times and errors.

    Raises
    ------
    CalibrationError : a run that cannot be used, or the file is there already.
    """
    if out.exists():
        raise CalibrationError(f"{out} is there already, and nothing is overwritten. Choose another name.")
    runs = [observed(folder) for folder in folders]
    runs += [observe_log(Path(folder), deployment_of(load_experiment([params]))) for folder, params in logs]
    runs += [_published_row(name, params) for name, params in published]
    stack = read_stack(base) if base else runs[0].deployment.stack
    fitted, table = calibrate(runs, stack, out.stem)
    write_stack(fitted, out)
    return f"{out}: give it as `stack`\n{calibration_text(fitted, table)}"
