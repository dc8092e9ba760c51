"""params/site.yaml: suggested from what Slurm says, written and read."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..checks import Table
from ..errors import JobError
from ..experiment.loading import BY_HAND, read_params_file
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..run.made_with import cite_client
from . import slurm
from .client_environment import CLIENT_PACKAGES, client_folder

SITE = REPOSITORY / "params/site.yaml"

SITE_KEYS = (
    *("partition", "account", "scratch_dir", "model_dir", "container_image", "container_mounts", "work_dir"),
    *("dataset_path", "trust_dataset", "harness_dir", "client_dir", "mpi", "request_gpus"),
)
# The site's only where no experiment's file says so.
EXPERIMENTS_KEYS = ("gpus_per_node", "segment", "time_limit")


def suggest_site(e: Experiment) -> dict[str, tuple[object, str]]:
    """What is about the site: key -> (value, where it comes from). Given values come first, then what Slurm says."""
    found = {}
    for key in SITE_KEYS + EXPERIMENTS_KEYS:
        value, source = getattr(e, key), e.provenance[key]
        of_site = key in SITE_KEYS or source in BY_HAND or Path(source).name == SITE.name
        if source != "default" and value is not None and of_site:
            found[key] = value, source
    if e.launcher == "slurm":
        with contextlib.suppress(JobError):  # the table of the machine and the cluster says so
            for partition in slurm.partitions():
                if partition.is_default:
                    found.setdefault("partition", (partition.name, "sinfo: the default partition"))
            accounts = slurm.accounts()
            if len(accounts) == 1:
                found.setdefault("account", (accounts[0], "sacctmgr: your only account"))
    if built := cite_client(client_folder(e)):
        versions = ", ".join(f"{name} {built.get(name)}" for name in CLIENT_PACKAGES)
        why = f"built by 00_setup: {versions}, digest {built.get('digest')}"
        found.setdefault("client_dir", (str(client_folder(e)), why))
    return found


def write_site(found: Mapping[str, tuple[object, str]], path: Path = SITE, write: bool = True) -> Table:
    """Write params/site.yaml if there is none (and `write`, and a partition is known); the difference in any case.

    Columns: key, in the file, found, from.
    """
    if write and "partition" in found and not path.exists():
        with path.open("x") as file:
            print(
                "# What is about this site; written once by 00_setup, yours to edit. No token belongs here.",
                file=file,
            )
            for key, (value, why) in found.items():
                print(f"{yaml.safe_dump({key: value}, width=1000).strip()}  # {why}", file=file)
    there = read_site(path)
    rows = [(key, there.get(key), *found.get(key, (None, ""))) for key in dict.fromkeys([*there, *found])]
    return Table(rows, columns=["key", "in the file", "found", "from"])


def read_site(path: Path = SITE) -> dict:
    """What params/site.yaml says; nothing if there is none.

    Raises
    ------
    ParameterError : it is not a params file.
    """
    return read_params_file(path, str(path)) if path.exists() else {}


def save_site(values: Mapping[str, object], path: Path = SITE) -> Path | None:
    """Write the site's values, whole or not at all; keys of the file that are not among them stay as they are.

    Returns
    -------
    What the former file is called now, None if there was none.
    """
    kept = {key: value for key, value in read_site(path).items() if key not in values}
    given = {key: value for key, value in values.items() if value is not None}
    draft = path.with_suffix(".draft")
    head = "# What is about this site; written by 00_setup's form, yours to edit. No token belongs here.\n"
    draft.write_text(head + yaml.safe_dump(kept | given, sort_keys=False, allow_unicode=True, width=1000))
    former = None
    if path.exists():
        former = next(p for n in range(1, 1000) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        os.link(path, former)  # fails rather than overwrites, should another have taken the name just now
    draft.replace(path)
    return former
