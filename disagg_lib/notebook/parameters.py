"""How a notebook gets its parameters."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..experiment.loading import (
    DEFAULT_PARAMS_FILES,
    load_experiment,
    load_recorded,
    refuse_contradiction,
    refuse_unknown,
)
from ..experiment.parameters import Experiment, parameter_kind, parameter_names

OF_A_NOTEBOOK = ("params_files", "run_dir")  # parameters that are about the notebook, not the experiment


def parameters_cell(makes_runs: bool) -> str:
    """Source of a notebook's parameters cell: one typed, commented line for every key it accepts.

    Parameters
    ----------
    makes_runs : True for the notebooks that resolve parameters (00, 01, 03); False for those that take
        a run folder as it is (04, 05), where a given value is checked against the folder.
    """
    files = repr(list(DEFAULT_PARAMS_FILES)) if makes_runs else "None"
    lines = [
        f"params_files: list = {files}  # YAML files, later ones win; relative to the repository's root",
        'run_dir: str = ""  # run folder; empty means '
        + ("a new one in results/" if makes_runs else "the newest in results/"),
        "# None means not given: then the params files decide, then the default.",
    ]
    for name in parameter_names():
        field = Experiment.model_fields[name]
        kind, options = parameter_kind(name)
        choice = f" ({' | '.join(options)})" if options else ""
        default = "" if field.default is None or kind is list else f"; default {field.default}"
        lines.append(f"{name}: {kind.__name__} = None  # {field.description}{choice}{default}")
    return "\n".join(lines)


def _literal_assignments(source: str) -> list[str]:
    """The names a cell assigns, if it does nothing but assign literals; otherwise nothing."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for statement in statements:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(targets[0], ast.Name):
            return []
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            return []
        names.append(targets[0].id)
    return names


def notebook_values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a notebook's parameters have now, as given by its cell, an edit of it, or papermill.

    Parameters
    ----------
    namespace : the notebook's `globals()`.

    Raises
    ------
    ParameterError : the parameters cell, or the one that papermill injected after it, names what no
        notebook accepts. (papermill itself only warns.)
    """
    accepted = (*OF_A_NOTEBOOK, *parameter_names())
    cells = [_literal_assignments(source) for source in namespace.get("In", [])]
    # From the last time that the parameters cell itself ran: earlier cells may hold a slip since mended.
    own = max((i for i, names in enumerate(cells) if set(accepted) <= set(names)), default=0)
    for names in cells[own:]:
        refuse_unknown(names, accepted, "this notebook's parameters")
    return {name: namespace[name] for name in accepted if namespace.get(name) is not None}


def notebook_experiment(namespace: Mapping[str, Any]) -> Experiment:
    """The Experiment that a notebook's parameters describe (00, 01, 03).

    Raises
    ------
    ParameterError, TopologyError
    """
    values = notebook_values(namespace)
    files = values.pop("params_files", DEFAULT_PARAMS_FILES)
    values.pop("run_dir", None)
    return load_experiment(files, values)


def notebook_run(namespace: Mapping[str, Any]) -> tuple[Path, Experiment]:
    """The run folder that a notebook's `run_dir` means, and its recorded Experiment (04, 05).

    Raises
    ------
    ParameterError : a given value differs from what the run was made with.
    RunFolderError : there is no such run.
    """
    from ..run.folder import find_run

    values = notebook_values(namespace)
    files = values.pop("params_files", None)
    run = find_run(values.pop("run_dir", None))
    experiment = load_recorded(run)
    refuse_contradiction(experiment, files or (), values, run)
    return run, experiment
