"""Parameters from files and by hand -> one Experiment that knows where each value came from."""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import ParameterError
from ..files import DATA, REPOSITORY, expand
from .parameters import Experiment, parameter_kind, parameter_names, what_is_needed
from .rules import check_together

DEFAULT_PARAMS_FILES = ("params/rehearsal.yaml",)
BY_HAND = ("given", "typed here", "papermill", "-p")  # origins of a value that no params file gave


def refuse_unknown(names: Iterable[str], accepted: Iterable[str], where: str) -> None:
    """Raise ParameterError for the first name that is not accepted, with the nearest valid one."""
    accepted = list(accepted)
    for name in names:
        if name not in accepted:
            near = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.0)[0]
            raise ParameterError(
                f"{where}: {name}: no such parameter. Did you mean {near}? All names: `python -m disagg_lib parameters`"
            )


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_params_file(path: Path, shown: str) -> dict[str, Any]:
    """Read one params file, a flat mapping of known keys, or the experiment.yaml of a run. `shown` names it in errors.

    Raises
    ------
    ParameterError : no such file, not YAML, not a mapping, an unknown or repeated key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ParameterError(
            f"{shown}: cannot be read ({reason}). Needed: a params file such as params/rehearsal.yaml, "
            f"relative to {REPOSITORY.name}/ or absolute"
        ) from None
    try:
        values = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ParameterError(f"{shown}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParameterError(
            f"{shown}: found {'nothing' if values is None else 'a ' + type(values).__name__}, needed a mapping: one `key: value` a line"
        )
    if set(values) == {"format", "parameters"}:
        values = _of_a_run(values["parameters"], shown)
    refuse_unknown(values, parameter_names(), shown)
    return values


def _of_a_run(recorded: Any, shown: str) -> dict[str, Any]:
    """The values of a run's experiment.yaml; what a shared one does not tell (REDACTED_...) is not given."""
    try:
        values = {name: entry["value"] for name, entry in recorded.items()}
    except (AttributeError, KeyError, TypeError):
        raise ParameterError(
            f"{shown}: not as 03_configuration writes experiment.yaml. Take it from a run folder"
        ) from None
    return {
        name: value for name, value in values.items() if value is not None and "REDACTED_" not in str(value)
    }


def recipe_values(name: str, gpu_system: str) -> dict[str, Any]:
    """What one word sets: the values of a recipe for all systems, then those for this one (data/recipes.yaml)."""
    recipe = yaml.load((DATA / "recipes.yaml").read_text(encoding="utf-8"), _StrictLoader).get(name, {})
    return recipe.get("parameters", {}) | recipe.get("systems", {}).get(gpu_system, {})


def _explain(error: Mapping, provenance: Mapping[str, str]) -> str:
    name = error["loc"][0]
    found = error["input"]
    note = (
        error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" else what_is_needed(name)
    )
    if str(found).lower() in ("true", "false") and parameter_kind(name)[0] is bool:
        note += f"; papermill's -p wants {str(found).title()}, or -y '{name}: {str(found).lower()}'"
    kind = {str: "text", int: "a whole number", float: "a number", bool: "true/false"}.get(
        type(found), type(found).__name__
    )
    shown = repr(found) if error["type"] == "string_pattern_mismatch" else f"{found!r} ({kind})"
    return f"{provenance.get(name, 'given')}: {name}: found {shown}, needed {note}"


_PATHS = (
    *("scratch_dir", "model_dir", "dataset_path", "stack", "lengths_file", "harness_dir"),
    *("client_dir", "container_image", "dynamo_dir"),
)


def _absolute_paths(e: Experiment, root: Path) -> dict[str, str]:
    """Paths that were given or have a default, below `root`; an image that is no .sqsh file is a registry's name, a stack without .yaml a shipped one's."""
    given = {name: value for name in _PATHS if (value := getattr(e, name))}
    for name, ending in (("container_image", ".sqsh"), ("stack", ".yaml")):
        if not given.get(name, ending).endswith(ending):
            del given[name]
    return {name: os.path.normpath(root / expand(value)) for name, value in given.items()}


def _recipe(sources: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The recipe that these sources name, as the source before them; an unknown word is left to the parameter's check."""
    said: dict[str, Any] = {}
    for _, mapping in sources:
        said |= {key: value for key, value in mapping.items() if value is not None}
    name, system = (said.get(key, Experiment.model_fields[key].default) for key in ("recipe", "gpu_system"))
    return [(f"recipe {name}", recipe_values(name, system))] if {type(name), type(system)} == {str} else []


def load_experiment(
    params_files: Iterable[str | Path] = DEFAULT_PARAMS_FILES,
    given: Mapping[str, Any] | None = None,
    root: Path = REPOSITORY,
    origin: str | Mapping[str, str] = "given",
) -> Experiment:
    """Resolve parameters: default < recipe < params files, in order < given.

    Parameters
    ----------
    params_files : flat YAML files; relative paths are below `root`.
    given : name -> value from an injected or edited cell, or from -p; None means not given.
    root : what relative paths (scratch_dir, dataset_path, ...) are below, too.
    origin : where `given` comes from, of all or name by name: one of BY_HAND.

    Raises
    ------
    ParameterError, TopologyError : file, key, found, needed, what to do; the first of each key.
    """
    if isinstance(params_files, str):
        raise ParameterError(
            f"params_files: found the text {params_files!r}, needed a list: [{params_files!r}]"
        )
    sources = [(str(name), read_params_file(root / expand(name), str(name))) for name in params_files]
    values: dict[str, Any] = {}
    provenance = dict.fromkeys(parameter_names(), "default")
    by_hand = dict(given or {})
    hand = dict.fromkeys(by_hand, origin) if isinstance(origin, str) else origin
    refuse_unknown(by_hand, parameter_names(), next(iter(hand.values()), "given"))
    sources.append((None, by_hand))
    for source, mapping in [*_recipe(sources), *sources]:
        for name, value in mapping.items():
            if value is not None:
                values[name], provenance[name] = value, source or hand.get(name, "given")
    try:
        experiment = Experiment(**values, provenance=provenance)
        experiment = Experiment(**values | _absolute_paths(experiment, root), provenance=provenance)
        check_together(experiment)
    except ValidationError as error:
        raise ParameterError("\n".join(_explain(item, provenance) for item in error.errors())) from None
    except ParameterError as error:
        where = provenance.get(str(error).split(":")[0], "default")
        last = sources[-2][0] if len(sources) > 1 else "given"
        raise type(error)(f"{last if where == 'default' else where}: {error}") from None
    return experiment


def experiment_from(
    params_files: Iterable[str | Path] | None, given: Mapping[str, Any], origin: str | Mapping[str, str]
) -> Experiment:
    """What comes in by any door (typed cell, papermill, command line): a rehearsal only if nothing at all was given.

    papermill's `-f FILE` injects the file's values one by one, so files and values must count alike.

    Raises
    ------
    ParameterError, TopologyError
    """
    if params_files is None:
        params_files = () if given else DEFAULT_PARAMS_FILES
    return load_experiment(params_files, given, origin=origin)


def changed(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The same experiment but for these values, validated anew; what differs counts as given. None: not given.

    Raises
    ------
    ParameterError, TopologyError
    """
    new = {name: value for name, value in values.items() if value != getattr(experiment, name)}
    kept, origins = experiment.model_dump(), experiment.provenance
    if {"recipe", "gpu_system"} & set(
        new
    ):  # another recipe's values take the place of this one's, and of defaults
        kept = {name: v for name, v in kept.items() if not origins[name].startswith(("recipe ", "default"))}
    made = load_experiment((), {**kept, **new})
    origins = {name: origins[name] if name in kept else made.provenance[name] for name in origins}
    origins |= {name: "default" if value is None else "typed here" for name, value in new.items()}
    return made.model_copy(update={"provenance": origins})


def experiment_text(experiment: Experiment) -> str:
    """experiment.yaml: every resolved parameter and where it came from; `load_recorded` reads it back."""
    values = experiment.model_dump(mode="json")
    recorded = {name: {"value": value, "from": experiment.provenance[name]} for name, value in values.items()}
    return yaml.safe_dump(
        {"format": 1, "parameters": recorded}, sort_keys=False, allow_unicode=True, width=1000
    )


def load_recorded(run_dir: Path) -> Experiment:
    """Read a run folder's experiment.yaml back.

    Raises
    ------
    ParameterError : absent, or not written by `experiment_text`.
    """
    path = run_dir / "experiment.yaml"
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))["parameters"]
        values = {name: entry["value"] for name, entry in recorded.items() if entry["value"] is not None}
        provenance = {name: str(entry["from"]) for name, entry in recorded.items()}
        return Experiment(**values, provenance=provenance)
    except FileNotFoundError:
        raise ParameterError(f"{path}: not there. Needed: a run folder that 03_configuration made") from None
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, ValidationError) as error:
        raise ParameterError(
            f"{path}: not as this release writes it ({' '.join(str(error).split())[:300]})"
        ) from None


def refuse_contradiction(
    recorded: Experiment, params_files: Iterable[str | Path], given: Mapping[str, Any], run_dir: Path
) -> None:
    """04 and 05 take a run folder's parameters as they are: a given value that differs is an error, not a silent no.

    Raises
    ------
    ParameterError
    """
    claims: dict[str, Any] = {}
    for name in params_files:
        claims |= read_params_file(REPOSITORY / expand(name), str(name))
    claims = {name: value for name, value in {**claims, **given}.items() if value is not None}
    kept = {name: value for name, value in recorded.model_dump().items() if value is not None}
    claimed = load_experiment((), {**kept, **claims})
    for name in claims:
        if getattr(claimed, name) != getattr(recorded, name):
            raise ParameterError(
                f"given: {name}: found {getattr(claimed, name)!r}, but {run_dir.name} was made with "
                f"{getattr(recorded, name)!r}. A run folder keeps its parameters: run 03_configuration for a new one"
            )
