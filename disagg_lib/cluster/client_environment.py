"""LoadGen, numpy and uvloop for the compute nodes, built there by a job."""

import hashlib
import json
import re
import shlex
from pathlib import Path

from ..checks import Check
from ..errors import JobError, SetupError
from ..experiment.parameters import Experiment
from ..experiment.rules import PLAIN_PATH
from ..files import sha256
from ..run.made_with import cite_client, pinned_versions
from .setup_job import failed_row, job_header, require_given, run_setup_job

CLIENT_PACKAGES = ("mlcommons-loadgen", "numpy", "uvloop")
BUILD_PACKAGES = ("setuptools", "wheel", "pybind11==2.11.1")  # what LoadGen 5.1.2's source package asks for
CHECK_CLIENT = Path(__file__).with_name("check_client.py")


def client_folder(e: Experiment) -> Path:
    """Where the client's environment for compute nodes is built."""
    return Path(e.scratch_dir) / "client_env"


def wheels_folder(e: Experiment) -> Path:
    """Where packages brought along for it are looked for, on clusters whose nodes have no internet."""
    return Path(e.scratch_dir) / "client_wheels"


def client_script(e: Experiment, brought: bool = False) -> str:
    """The job that installs LoadGen (built from its source package), numpy and uvloop into `client_folder`.

    `brought`: the packages come from `wheels_folder`; then nothing else is asked.

    Raises
    ------
    SetupError : no image is given, or its mounts cannot be written down.
    """
    pins, wheels = pinned_versions(), str(wheels_folder(e))
    packages = ["--no-binary", CLIENT_PACKAGES[0], *(f"{name}=={pins[name]}" for name in CLIENT_PACKAGES)]
    where = ["--no-index", "--find-links", wheels] if brought else []
    bring = f"python3 -m pip download {shlex.join(['--dest', wheels, *packages, *BUILD_PACKAGES])}"
    step = ""
    if e.launcher == "slurm" and e.container == "pyxis":
        require_given(e, "client", "container_image")
        if not re.fullmatch(PLAIN_PATH, e.scratch_dir):
            why = "pyxis would expand or split it. Use a path of letters, digits and _./+@=~-"
            raise SetupError(f"scratch_dir: found {e.scratch_dir!r}; {why}")
        mounts = dict.fromkeys([f"{e.scratch_dir}:{e.scratch_dir}", *(e.container_mounts or "").split(",")])
        mounted = f"--container-mounts={','.join(filter(None, mounts))}"
        image = f"--container-image={e.container_image}"
        step = shlex.join(["srun", image, mounted, "--container-remap-root"])
    return (
        job_header(e, "client", "0:30:00", mem="0")
        + f"""target={shlex.quote(str(client_folder(e)))}
[[ -e $target ]] && fail "$target is there already, and nothing is overwritten"
draft=$target.draft-${{SLURM_JOB_ID:-$$}}
step() {{ {step} "$@"; }}
if ! step python3 -m pip install --no-input --disable-pip-version-check --no-cache-dir --target "$draft" \\
  {shlex.join([*where, *packages])}; then
  echo 'If this node has no internet, bring the packages along, from a machine with the same python3 and processor:'
  fail {shlex.quote(bring)}
fi
# Five seconds of LoadGen, from that folder
step env PYTHONPATH="$draft" python3 "$PWD/check_client.py" "$PWD/check" "$draft" | tee check.json || exit 1
mv -T -- "$draft" "$target"
"""
    )


def build_client(e: Experiment, out=print) -> dict:
    """Build the client's environment on a compute node unless it is there; returns its path, versions and digest."""
    folder = client_folder(e)
    if not folder.exists():
        files = {CHECK_CLIENT.name: CHECK_CLIENT.read_text()}
        script = client_script(e, wheels_folder(e).is_dir())
        job = run_setup_job(e, "client", script, files, out=out)
        checked = json.loads((job / "check.json").read_text().splitlines()[-1])
        names = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        lines = "".join(f"{sha256(path)}  {path.relative_to(folder)}\n" for path in names)
        value = {"path": str(folder), "mlcommons-loadgen": pinned_versions()["mlcommons-loadgen"], **checked}
        value["digest"] = hashlib.sha256(lines.encode()).hexdigest()
        (folder / "client_env.json").write_text(json.dumps(value, indent=1) + "\n")
    cited = cite_client(folder)
    if cited is None:
        raise SetupError(f"{folder}: not made by 00_setup, or cut short. Remove it and run this again")
    return cited


def client_rows(e: Experiment, out=print) -> list[Check]:
    """The row of the client's environment for compute nodes; `setup_jobs: all` builds an absent one first."""
    if e.engine == "rehearsal" or e.launcher == "local" or e.client != "loadgen":
        return []
    if e.setup_jobs == "all" and not e.client_dir:
        try:
            build_client(e, out=out)
        except (SetupError, JobError) as error:
            return failed_row("client", error)
    folder = Path(e.client_dir or client_folder(e))
    cited = cite_client(folder)
    found = f"none in {folder}"
    fix = "set setup_jobs: all to build it, or go on if the container brings LoadGen and numpy"
    if cited:
        found = f"{folder}: LoadGen {cited['mlcommons-loadgen']}, {cited['machine']}"
        found += "" if e.client_dir else ", but client_dir does not name it"
        fix = f"set client_dir: {folder} in params/site.yaml"
    ok = bool(cited and e.client_dir)
    return [Check("client_dir holds LoadGen and numpy for the nodes", found, ok, fix, level="warning")]
