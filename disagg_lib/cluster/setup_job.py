"""Setup on a cluster: the probe of a compute node, the container image, the client's environment, params/site.yaml.

Each is a job of one node with a folder of its own, `<scratch_dir>/setup/<time>_<kind>/`: job.sh, output.txt and
what it found. The texts are pure functions of the Experiment; `run_setup_job` submits and follows them. Whatever makes
or runs a job raises SetupError, and JobError where Slurm refuses it.
"""

import contextlib
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..checks import Check
from ..errors import DisaggError, NoAnswer, SetupError
from ..experiment.parameters import Experiment
from ..job.deaths import last_lines
from . import launch, slurm

ENDED_WELL = slurm.SLURM_STATES["COMPLETED"][1]

# The status goes into a file: accounting may be absent, and squeue forgets. Variables that would redirect the harness
# are facts of the v5.1 code; tokens are nobody's business on a compute node. A draft goes when the job ends.
PREAMBLE = """# shellcheck disable=SC2016,SC2329 # quoted values stay as they are; traps call functions
set -uo pipefail
cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "$0")}" || exit 1
JOB=$PWD
draft=
ended() {
  echo "$?" >"$JOB/status"
  [[ -z $draft ]] || rm -rf -- "$draft"
}
trap ended EXIT
trap 'exit 143' TERM
unset LOG_DIR MODEL_DIR DATA_DIR PREPROCESSED_DATA_DIR BUILD_DIR CONFIG_DIR ARTIFACTS_DIR
unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN
fail() { echo "$*"; exit 1; }

"""


def job_header(e: Experiment, kind: str, time_limit: str, gpus: bool = True, **options: str) -> str:
    options = {"job-name": f"disagg_setup_{kind}", "nodes": "1", "ntasks": "1", "time": time_limit} | options
    if gpus and e.request_gpus and e.engine != "external":
        options["gpus-per-node"] = str(e.gpus_per_node)
    options |= {key: value for key in ("partition", "account") if (value := getattr(e, key))}
    lines = [f"#SBATCH --{key}={value}".removesuffix("=") for key, value in options.items()]
    lines += [f"#SBATCH {option}" for option in e.sbatch_options]
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --output=output.txt", "#SBATCH --no-requeue", PREAMBLE])


def require_given(e: Experiment, job: str, *keys: str) -> None:
    for key in keys:
        if not getattr(e, key):
            raise SetupError(f"{key}: not given, and the {job} job needs it. Set it in params/site.yaml")


def run_setup_job(
    e: Experiment,
    kind: str,
    script: str,
    files: Mapping[str, str] | None = None,
    out=print,
    poll_s: float = 1.0,
) -> Path:
    """Submit a setup job, say what it does until it ends, and return its folder. Ctrl-C cancels it.

    Raises
    ------
    SetupError : it ended with a status other than 0, with its last lines; or its folder cannot be made.
    JobError : Slurm refused it.
    """
    folder = _job_folder(e, kind, {"job.sh": script, **(files or {})})
    output, status = folder / "output.txt", folder / "status"
    state, cancel = _start_local(folder, output) if e.launcher == "local" else _start_slurm(folder)
    out(f"{kind}: job folder {folder}")
    try:
        words = _follow(state, output, out, poll_s)
    except KeyboardInterrupt:
        cancel()
        raise
    deadline = time.monotonic() + launch.FINAL_WORD_S
    while not status.exists() and time.monotonic() < deadline and "its script ended" in words:
        time.sleep(0.2)
    code = status.read_text().strip() if status.exists() else ""
    if code != "0" or words not in (ENDED_WELL, ""):
        words = f"ended with status {code}" if code not in ("", "0") else words or "is gone"
        raise SetupError(f"the {kind} job: {words}: {last_lines(output, 5)}. All of it: {output}")
    return folder


def _job_folder(e: Experiment, kind: str, files: Mapping[str, str]) -> Path:
    folder = Path(e.scratch_dir) / "setup" / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}_{kind}"
    try:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        fix = "Set scratch_dir to a shared folder that you may write"
        raise SetupError(f"{folder}: cannot be made ({error.strerror}). {fix}") from None
    return folder


def _start_local(folder: Path, output: Path) -> tuple[Callable, Callable]:
    """Start job.sh here, in a session of its own: what it started is ended with it. Returns (state, cancel)."""
    with output.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "job.sh"], cwd=folder, env=slurm.job_environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True
        )  # fmt: skip

    def cancel():
        # A child that bash has forked and not yet replaced takes the signal as bash does and forgets it: so, again.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                return
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    return lambda: (False, "running") if process.poll() is None else (True, ENDED_WELL), cancel


def _start_slurm(folder: Path) -> tuple[Callable, Callable]:
    environment = slurm.job_environment()
    answer = slurm.slurm("sbatch", "--parsable", "job.sh", tries=1, cwd=folder, environment=environment)
    job_id = answer.strip().split(";")[0]
    return lambda: _slurm_state(job_id), lambda: slurm.slurm("scancel", job_id)


def _slurm_state(job_id: str) -> tuple[bool, str]:
    try:
        word, why = slurm.job_word(job_id)
    except NoAnswer as silence:
        return False, str(silence)
    ended, meaning = slurm.SLURM_STATES.get(word, (not word, word))  # '': Slurm has forgotten it
    return ended, meaning + (f" ({why})" if why and not ended else "")


def _follow(state: Callable[[], tuple[bool, str]], output: Path, out, poll_s: float) -> str:
    """Print what changes, and the output as it grows, until the end; returns the last word on the state."""
    said, place = "", 0
    while True:
        ended, words = state()
        if words != said:
            out(f"{time.strftime('%H:%M:%S')}  {words}")
            said = words
        text = output.read_bytes()[place:] if output.exists() else b""
        whole = text[: text.rfind(b"\n") + 1] if not ended else text
        place += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            out(f"  {line}")
        if ended:
            return words
        time.sleep(poll_s)


def failed_row(job: str, error: DisaggError) -> list[Check]:
    fix = "do what it says, and run 00_setup again"
    return [Check(f"the {job} job does its work", str(error), False, fix)]
