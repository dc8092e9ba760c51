"""How a notebook gets its parameters."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..cluster.runs import run_for
from ..experiment.loading import experiment_from, load_recorded, refuse_contradiction, refuse_unknown
from ..experiment.parameters import Experiment, parameter_kind, parameter_names
from ..run.folder import find_run
from .opening import choose_preset, one_line_errors, show_headline, show_run

OF_A_NOTEBOOK = ("params_files", "run_dir", "submit_beside")  # about the notebook, not the experiment
GROUPS = {  # first parameter of each group of the cell -> what the group is about
    "recipe": "what runs",
    "num_ctx_servers": "topology",
    "find_target_qps": "search and plan",
    "server_target_qps": "load",
    "rehearsal_queries": "rehearsal",
    "scratch_dir": "site: model, cluster",
    "dynamo_release": "Dynamo",
    "system_name": "other ways: NVIDIA's harness, a server that is up",
}


def parameters_cell(makes_runs: bool) -> str:
    """Source of a notebook's parameters cell: one typed, commented line for every key it accepts.

    Parameters
    ----------
    makes_runs : True for the notebooks that resolve parameters (00 to 03); False for those that take
        a run folder as it is (04, 05), where a given value is checked against the folder.
    """
    meaning = "a new one in results/" if makes_runs else "the one that is meant; the first cell says which"
    lines = [
        f"# {len(parameter_names())} parameters: click to open. None means not given: the params files decide, then the default.",
        "params_files: list = None  # YAML files, later ones win; not given, and nothing else: params/rehearsal.yaml",
        f'run_dir: str = ""  # run folder, its name or the unique part of one; empty means {meaning}',
        "submit_beside: bool = None  # 04: true submits although another job of this tree runs",
    ]
    for name in parameter_names():
        if name in GROUPS:
            lines.append(f"# -- {GROUPS[name]}")
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
        match statement:
            case ast.Assign(targets=[ast.Name(id=name), *_]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case _:
                return []
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            return []
    return names


def _cells(namespace: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(source, names it assigns) of the parameters cell as it ran last and of every cell of literals after it."""
    accepted = {*OF_A_NOTEBOOK, *parameter_names()}
    cells = [(source, _literal_assignments(source)) for source in namespace.get("In", [])]
    # From the last time that the parameters cell itself ran: earlier cells may hold a slip since mended.
    return cells[max((i for i, (_, names) in enumerate(cells) if accepted <= set(names)), default=0) :]


def notebook_values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a notebook's `globals()` of its parameters, as given by its cell, an edit of it, or papermill.

    Raises
    ------
    ParameterError : the parameters cell, or the one that papermill injected after it, names what no
        notebook accepts. (papermill itself only warns.)
    """
    accepted = (*OF_A_NOTEBOOK, *parameter_names())
    for _, names in _cells(namespace):
        refuse_unknown(names, accepted, "this notebook's parameters")
    values = {name: namespace[name] for name in accepted if namespace.get(name) is not None}
    if isinstance(values.get("params_files"), str):  # papermill's -p gives text
        values["params_files"] = _listed(values["params_files"])
    return values


def _listed(text: str) -> list[str]:
    """A list as YAML writes it, or one name alone."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    return found if isinstance(found, list) else [text]


def origins(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> who gave it: papermill, or somebody who typed it here."""
    found = {}
    for source, names in _cells(namespace):
        found |= dict.fromkeys(names, "papermill" if source.startswith("# Parameters\n") else "typed here")
    return found


def notebook_experiment(namespace: dict[str, Any]) -> Experiment:
    """The Experiment that a notebook's parameters describe (00 to 03), with the line that says what it is.

    Live, a list of presets to start from stands below that line; see `choose_preset`.

    Raises
    ------
    ParameterError, TopologyError
    """
    one_line_errors()
    values = notebook_values(namespace)
    given = {name: value for name, value in values.items() if name not in OF_A_NOTEBOOK}
    files = namespace.get("chosen_preset") or values.get("params_files")
    experiment = experiment_from(files, given, origins(namespace))
    show_headline(experiment)
    choose_preset(namespace)
    return experiment


def notebook_run(namespace: dict[str, Any], purpose: str = "read") -> tuple[Path, Experiment]:
    """The run folder that a notebook means, and its recorded Experiment (04, 05), with the line that says what it is.

    Parameters
    ----------
    purpose : launch (04) or read (05): which run is meant where `run_dir` is empty; see `cluster.runs`. 05 calls `show_run`
        itself, below its verdict.

    Raises
    ------
    ParameterError : a given value differs from what the run was made with.
    RunFolderError : there is no such run.
    """
    one_line_errors()
    values = notebook_values(namespace)
    given = {name: value for name, value in values.items() if name not in OF_A_NOTEBOOK}
    wanted = values.get("run_dir") or namespace.get("chosen_run")
    run = find_run(wanted) if wanted else run_for(purpose)
    experiment = load_recorded(run)
    refuse_contradiction(experiment, values.get("params_files") or (), given, run)
    if purpose == "launch":  # 05 begins with its verdict
        show_run(namespace, run, experiment)
    return run, experiment
