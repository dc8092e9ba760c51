"""Setup on a cluster: the probe of a compute node, the container image, the client's environment, params/site.yaml.

Each is a job of one node with a folder of its own, `<scratch_dir>/setup/<time>_<kind>/`: job.sh, output.txt and
what it found. The texts are pure functions of the Experiment; `run_setup_job` submits and follows them. Whatever makes
or runs a job raises SetupError, and JobError where Slurm refuses it.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from . import launch
from .errors import DisaggError
from .experiment import REPOSITORY, Experiment, read_params_file
from .job_agent import last_lines
from .preflight import Check, pinned_versions
from .run_folder import Table

SITE = REPOSITORY / "params/site.yaml"
ELF_MACHINES = {183: "aarch64", 62: "x86_64"}  # e_machine in an ELF header
ENDED_WELL = launch.SLURM_STATES["COMPLETED"][1]
PROBE_KEPT_S = 7 * 86400
CLIENT_PACKAGES = ("mlcommons-loadgen", "numpy", "uvloop")
BUILD_PACKAGES = ("setuptools", "wheel", "pybind11==2.11.1")  # what LoadGen 5.1.2's source package asks for
CHECK_CLIENT = Path(__file__).parent / "templates/check_client.py"


class SetupError(DisaggError):
    """A setup job failed, or cannot be made from these parameters."""


# -- the scripts

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


def _header(e: Experiment, kind: str, time_limit: str, gpus: bool = True, **options: str) -> str:
    options = {"job-name": f"disagg_setup_{kind}", "nodes": "1", "ntasks": "1", "time": time_limit} | options
    if gpus and e.engine != "external":
        options["gpus-per-node"] = str(e.gpus_per_node)
    options |= {key: value for key in ("partition", "account") if (value := getattr(e, key))}
    lines = [f"#SBATCH --{key}={value}".removesuffix("=") for key, value in options.items()]
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --output=output.txt", "#SBATCH --no-requeue", PREAMBLE])


def _visible(e: Experiment) -> list[str]:
    """Host paths that a compute node must see: run folders, scratch, what is given, mounts, the image's folder."""
    mounts = [pair.partition(":")[0] for pair in (e.container_mounts or "").split(",")]
    image = e.container_image if (e.container_image or "").endswith(".sqsh") else None
    paths = [REPOSITORY, e.scratch_dir, e.dataset_path, e.client_dir, e.harness_dir, *mounts]
    return list(dict.fromkeys(str(path) for path in [*paths, image and Path(image).parent] if path))


def probe_script(e: Experiment) -> str:
    """A job of two minutes that writes what a compute node has into probe.txt: a name, a tab, a value a line."""
    return (
        _header(e, "probe", "0:02:00", gpus=e.engine == "trtllm")
        + f"""scratch={shlex.quote(e.scratch_dir)}
say() {{ printf '%s\\t%s\\n' "$1" "$2" >>probe.txt; }}
say host "$(hostname)"
say arch "$(uname -m)"
say python3 "$(python3 -c 'import platform; print(platform.python_version())' 2>&1)"
say gpus "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | paste -sd';')"
say fabric "$(nvidia-smi -q 2>&1 | awk '/ClusterUUID|CliqueId/ {{ print $NF }}' | paste -sd' ')" # a pair a GPU
say pyxis "$(srun --help 2>&1 | grep -c -e --container-image)"
for path in {shlex.join(_visible(e))}; do
  if [[ -r $path ]]; then say "path $path" readable; else say "path $path" 'not readable'; fi
done
if own=$(mktemp -p "$scratch" .probe-XXXXXX 2>refusal.txt) && rm -- "$own" 2>>refusal.txt; then say scratch writable
else say scratch "$(paste -sd' ' refusal.txt)"; fi
say free_kb "$(df -Pk -- "$scratch" 2>&1 | awk 'NR == 2 {{ print $4 }}')"
say end ''
"""
    )


def _require_given(e: Experiment, job: str, *keys: str) -> None:
    for key in keys:
        if not getattr(e, key):
            raise SetupError(f"{key}: not given, and the {job} job needs it. Set it in params/site.yaml")


def image_script(e: Experiment, arch: str = "aarch64") -> str:
    """The job that builds `container_image` with the harness's makefile, and leaves `<image>.sha256` beside it.

    From the v5.1 code: the makefile lies in closed/NVIDIA itself (the original's README says one folder below),
    needs --container-remap-root, and asks: for the account, if none is given, then whether to go on.

    Raises
    ------
    SetupError : a parameter is not given or not a plain path, or the makefile is not there.
    """
    _require_given(e, "image", "harness_dir", "container_image", "partition")
    if not (Path(e.harness_dir) / "Makefile.pyxis").is_file():
        needed = "the v5.1 tree's closed/NVIDIA"
        raise SetupError(f"harness_dir: {e.harness_dir} has no Makefile.pyxis. Needed: {needed}")
    if not e.container_image.endswith(".sqsh"):
        needed = "the path of the .sqsh file to make"
        raise SetupError(f"container_image: found {e.container_image!r}, needed {needed}")
    for key in ("harness_dir", "container_image", "scratch_dir"):
        if not re.fullmatch(r"[\w./+@=-]+", getattr(e, key)):
            why = "make and its recipes would split or expand it. Use a path of letters, digits and ./_+@=-"
            raise SetupError(f"{key}: found {getattr(e, key)!r}; {why}")
    values = {
        "ARCH": arch,
        "SLURM_MODE": "srun",
        "SBATCH_PARTITION": e.partition,
        "SBATCH_ACCOUNT": e.account or "",
        "INSTALL_TRTLLM": "1",
        "INSTALL_LOADGEN": "1",
        "MLPERF_SCRATCH_PATH": e.scratch_dir,
        "EXTRA_SRUN_FLAGS": "--container-remap-root",
    }
    answers = "y\\n" if e.account else "\\ny\\n"
    return (
        _header(e, "image", e.time_limit, exclusive="")
        + f"""image={shlex.quote(e.container_image)}
[[ -e $image ]] && fail "$image is there already, and nothing is overwritten"
draft=${{image%.sqsh}}.draft-${{SLURM_JOB_ID:-$$}}.sqsh # it gets its name when it is whole
cd -- {shlex.quote(e.harness_dir)} || exit 1
printf '{answers}' | make -f Makefile.pyxis build_base_sqsh "SBATCH_CONTAINER_SAVE=$draft" \\
  {shlex.join(f"{key}={value}" for key, value in values.items())} || exit 1
[[ $(head -c 4 -- "$draft") == hsqs ]] || fail "$draft is no squashfs image"
digest=$(sha256sum <"$draft") || exit 1
mv -n -- "$draft" "$image"
[[ -e $draft ]] && fail "$image came from elsewhere meanwhile"
[[ -e $image.sha256 ]] || printf '%s  %s\\n' "${{digest%% *}}" "${{image##*/}}" >"$image.sha256"
"""
    )


def client_folder(e: Experiment) -> Path:
    """Where the client's environment for compute nodes is built."""
    return Path(e.scratch_dir) / "client_env"


def wheels_folder(e: Experiment) -> Path:
    """Where packages brought along for it are looked for, on clusters whose nodes have no internet."""
    return Path(e.scratch_dir) / "client_wheels"


def client_script(e: Experiment, brought: bool = False) -> str:
    """The job that installs LoadGen (built from its source package), numpy and uvloop into `client_folder`.

    Parameters
    ----------
    brought : whether the packages come from `wheels_folder`; then nothing else is asked.

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
        _require_given(e, "client", "container_image")
        if re.search("[,:]", e.scratch_dir):
            why = "a container's mounts cannot hold , and :"
            raise SetupError(f"scratch_dir: found {e.scratch_dir!r}; {why}")
        mounts = dict.fromkeys([f"{e.scratch_dir}:{e.scratch_dir}", *(e.container_mounts or "").split(",")])
        options = [
            f"--container-image={e.container_image}",
            f"--container-mounts={','.join(filter(None, mounts))}",
        ]
        step = shlex.join(["srun", *options, "--container-remap-root"])
    return (
        _header(e, "client", "0:30:00")
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


# -- running them


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
    folder = Path(e.scratch_dir) / "setup" / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}_{kind}"
    try:
        folder.mkdir(parents=True)
        for name, text in {"job.sh": script, **(files or {})}.items():
            (folder / name).write_text(text)
    except OSError as error:
        fix = "Set scratch_dir to a shared folder that you may write"
        raise SetupError(f"{folder}: cannot be made ({error.strerror}). {fix}") from None
    output, status, environment = folder / "output.txt", folder / "status", launch._environment()
    if e.launcher == "local":
        with output.open("wb") as log:  # a session of its own: what it started is ended with it
            process = subprocess.Popen(
                ["bash", "job.sh"], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True
            )  # fmt: skip

        def state():
            return (False, "running") if process.poll() is None else (True, ENDED_WELL)

        def cancel():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)
    else:
        answer = launch.slurm("sbatch", "--parsable", "job.sh", tries=1, cwd=folder, environment=environment)
        job_id = answer.strip().split(";")[0]

        def state():
            return _slurm_state(job_id)

        def cancel():
            launch.slurm("scancel", job_id)

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


def _slurm_state(job_id: str) -> tuple[bool, str]:
    try:
        word, why = launch._slurm_state(job_id)
    except launch.NoAnswer as silence:
        return False, str(silence)
    ended, meaning = launch.SLURM_STATES.get(word, (not word, word))  # '': Slurm has forgotten it
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


# -- what they found


def read_probe(folder: Path) -> dict[str, str]:
    """probe.txt of a probe's folder.

    Raises
    ------
    SetupError : absent or cut short.
    """
    path = folder / "probe.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    found = dict(line.split("\t", 1) for line in lines if "\t" in line)
    if "end" not in found:
        raise SetupError(f"{path}: absent or cut short. Run the probe again")
    return found


def probe_checks(e: Experiment, found: Mapping[str, str]) -> list[Check]:
    """What a compute node has against what the run needs; one row a requirement."""
    version = tuple(int(n) for n in found["python3"].split(".")[:2]) if found["python3"][:1].isdigit() else ()
    fix = "ask the administrators for python3 on the nodes"
    rows = [("python3 3.8 or newer", found["python3"], version >= (3, 8), fix)]
    known = found["arch"] in ELF_MACHINES.values()
    rows.append(("aarch64 or x86_64", found["arch"], known, "choose another partition"))
    if e.engine == "trtllm":
        gpus = [line for line in found["gpus"].split(";") if line.count(",") == 2]
        told = f"{len(gpus)} x {gpus[0].strip()}" if gpus else found["gpus"][:200]
        fix = "set gpus_per_node to what a node has, or choose another partition"
        whole = len(gpus) == e.gpus_per_node
        rows.append((f"{e.gpus_per_node} GPUs (name, memory, driver)", told, whole, fix))
        pairs = found["fabric"].split()
        domains = {tuple(pairs[i : i + 2]) for i in range(0, len(pairs), 2)}
        across = any(len(server.nodes) > 1 for server in e.servers)
        one = len(domains) == 1 and min(domains)[-1].strip("0-") not in ("", "N/A")  # of 0 only: no fabric
        told = " ".join(min(domains)) if len(domains) == 1 else f"{len(domains)} domains: {found['fabric']}"
        fix = "servers of one node only need none; otherwise ask for nodes of one rack (segment)"
        spans = " (a server spans several nodes)" if across else ""
        rows.append((f"one NVLink domain{spans}", told[:200], one or not across, fix))
    if e.container == "pyxis":
        pyxis = found["pyxis"] != "0"
        fix = "install pyxis and enroot, or set container: none"
        rows.append(("srun knows --container-image (pyxis)", "yes" if pyxis else "no", pyxis, fix))
    fix = "mount it on the nodes, or set another path in params/site.yaml"
    paths = {name[5:]: value for name, value in found.items() if name.startswith("path ")}
    rows += [(f"{path} is visible", value, value == "readable", fix) for path, value in paths.items()]
    fix = "set scratch_dir to a shared folder of yours"
    rows.append(("scratch_dir is writable", found["scratch"], found["scratch"] == "writable", fix))
    free_gb = int(found["free_kb"]) * 1024 / 1e9 if found["free_kb"].isdigit() else 0.0
    fix = "free some, or set scratch_dir"
    rows.append(("1 GB free in scratch_dir", f"{free_gb:.0f} GB", free_gb >= 1, fix))
    return [Check(f"on {found['host']}: {requirement}", *rest) for requirement, *rest in rows]


def _last_probe(e: Experiment, script: str) -> Path | None:
    """Folder of the newest whole probe by this very script, unless it is older than PROBE_KEPT_S."""
    for path in sorted((Path(e.scratch_dir) / "setup").glob("*_probe/probe.txt"), reverse=True):
        if time.time() - path.stat().st_mtime > PROBE_KEPT_S:
            return None
        if (path.parent / "job.sh").read_text() == script and "\nend\t" in path.read_text(errors="replace"):
            return path.parent
    return None


def probe(e: Experiment, out=print) -> list[Check]:
    """What a compute node has, by a job of one node and two minutes at most. A whole probe of this week is read again."""
    script = probe_script(e)
    folder = _last_probe(e, script)
    if folder:
        out(f"the probe of {folder.name.rpartition('_')[0]} is read again; for a new one remove {folder}")
    return probe_checks(e, read_probe(folder or run_setup_job(e, "probe", script, out=out)))


def _image_arch(image: Path) -> str:
    """Architecture of a program in the image, from its ELF header; or why it is not known."""
    if shutil.which("unsquashfs") is None:
        return "not looked at: unsquashfs (package squashfs-tools) is absent here"
    with tempfile.TemporaryDirectory() as place:
        command = ["unsquashfs", "-no-xattrs", "-d", f"{place}/root", str(image), "usr/bin/env"]
        try:
            subprocess.run(command, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "not looked at: unsquashfs took more than 120 s"
        program = Path(place) / "root/usr/bin/env"
        # A link would lead to a program of this machine.
        head = program.read_bytes()[:20] if program.is_file() and not program.is_symlink() else b""
    if head[:4] != b"\x7fELF":
        return "not known: no program usr/bin/env in it"
    machine = int.from_bytes(head[18:20], "little")
    return ELF_MACHINES.get(machine, f"ELF machine {machine}")


def image_checks(image: str | Path, arch: str = "aarch64", min_gb: float = 1.0) -> list[Check]:
    """Whether a file is an enroot image for this architecture."""
    image, fix = Path(image), "build it (00_setup), or set container_image to one that is"
    if not image.is_file():
        return [Check("container_image is there", f"no file {image}", False, fix)]
    with image.open("rb") as file:
        magic = file.read(4)
    squashfs, size_gb = magic == b"hsqs", image.stat().st_size / 1e9
    found = _image_arch(image) if squashfs else "no squashfs image"
    unknown = found.startswith("not ")
    see, level = (f"see that it is for {arch}", "warning") if unknown else (fix, "error")
    size = (f"container_image has {min_gb} GB or more", f"{size_gb:.2f} GB", size_gb >= min_gb)
    return [
        Check("container_image is a squashfs image", repr(magic), squashfs, fix),
        Check(*size, f"it was cut short: {fix}"),
        Check(f"container_image is for {arch}", found, found == arch, see, level=level),
    ]


def build_image(e: Experiment, arch: str = "aarch64", out=print, min_gb: float = 1.0) -> list[Check]:
    """Build container_image unless it is there, and check it."""
    if not (e.container_image and Path(e.container_image).exists()):
        run_setup_job(e, "image", image_script(e, arch), out=out)
    return image_checks(e.container_image, arch, min_gb)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cite_image(e: Experiment) -> dict | None:
    """What a run's manifest says of the image: path and SHA-256; None for a registry's name, or if none is recorded.

    It stands, as sha256sum writes it, beside the image, or in scratch_dir where that is someone else's folder. One
    that is older than the image is another's.
    """
    image = Path(e.container_image or "")
    for record, name in ((Path(f"{image}.sha256"), image.name), (_image_record(e), str(image))):
        if image.is_file() and record.is_file() and record.stat().st_mtime >= image.stat().st_mtime:
            digest, _, named = record.read_text(errors="replace").strip().partition("  ")
            if named == name and re.fullmatch("[0-9a-f]{64}", digest):
                return {"path": str(image), "sha256": digest}
    return None


def _image_record(e: Experiment) -> Path:
    return Path(e.scratch_dir) / "setup" / f"{Path(e.container_image or '').name}.sha256"


def record_image(e: Experiment, out=print) -> dict:
    """Make an image that was brought along citable, too; its own folder is not touched.

    Raises
    ------
    SetupError : scratch_dir cannot be written.
    """
    image, record = Path(e.container_image), _image_record(e)
    if cite_image(e) is None:
        out(f"SHA-256 of {image}, once: {image.stat().st_size / 1e9:.2f} GB")
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{_sha256(image)}  {image}\n")
        except OSError as error:
            raise SetupError(f"{record}: {error.strerror}. Set scratch_dir to a folder of yours") from None
    return cite_image(e)


def build_client(e: Experiment, out=print) -> dict:
    """Build the client's environment on a compute node unless it is there; returns its path, versions and digest."""
    folder = client_folder(e)
    if not folder.exists():
        script, files = (
            client_script(e, wheels_folder(e).is_dir()),
            {CHECK_CLIENT.name: CHECK_CLIENT.read_text()},
        )
        job = run_setup_job(e, "client", script, files, out=out)
        checked = json.loads((job / "check.json").read_text().splitlines()[-1])
        names = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        lines = "".join(f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in names)
        value = {"path": str(folder), "mlcommons-loadgen": pinned_versions()["mlcommons-loadgen"], **checked}
        value["digest"] = hashlib.sha256(lines.encode()).hexdigest()
        (folder / "client_env.json").write_text(json.dumps(value, indent=1) + "\n")
    cited = cite_client(folder)
    if cited is None:
        raise SetupError(f"{folder}: not made by 00_setup, or cut short. Remove it and run this again")
    return cited


def cite_client(folder: str | Path) -> dict | None:
    """What a run's manifest says of the client's environment: path, versions, digest; None if 00_setup did not build it."""
    record = Path(folder) / "client_env.json"
    return json.loads(record.read_text()) if record.is_file() else None


# -- what 00_setup does, as `setup_jobs` allows


def _failed(job: str, error: DisaggError) -> list[Check]:
    fix = "do what it says, and run 00_setup again"
    return [Check(f"the {job} job does its work", str(error), False, fix)]


def node_rows(e: Experiment, out=print) -> list[Check]:
    """A compute node's rows of 00's table; empty with `setup_jobs: none`, or where this machine is the node."""
    if e.launcher == "local" or e.setup_jobs == "none":
        local = "launcher: local: this machine does it all"
        out(local if e.launcher == "local" else "setup_jobs: none: no probe job")
        return []
    try:
        return probe(e, out)
    except (SetupError, launch.JobError) as error:
        return _failed("probe", error)


def image_rows(e: Experiment, out=print) -> list[Check]:
    """The image's rows; `setup_jobs: all` builds an absent one first. Empty without a container, or for a registry's name."""
    image = e.container_image or ""
    if e.container == "none" or (image and not image.endswith(".sqsh")):
        return []
    looked_at = _last_probe(e, probe_script(e))
    arch = read_probe(looked_at)["arch"] if looked_at else "aarch64"  # a GB200's
    if e.setup_jobs == "all":
        try:
            rows = build_image(e, arch, out)
        except (SetupError, launch.JobError) as error:
            return _failed("image", error)
    else:
        rows = image_checks(image or "container_image, which is not given", arch)
    if Path(image).is_file():
        rows.append(Check("container_image's SHA-256 is recorded", record_image(e, out)["sha256"], True))
    return rows


def client_rows(e: Experiment, out=print) -> list[Check]:
    """The row of the client's environment for compute nodes; `setup_jobs: all` builds an absent one first."""
    if e.engine == "rehearsal" or e.launcher == "local" or e.client != "loadgen":
        return []
    if e.setup_jobs == "all" and not e.client_dir:
        try:
            build_client(e, out=out)
        except (SetupError, launch.JobError) as error:
            return _failed("client", error)
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


# -- params/site.yaml


SITE_KEYS = (
    *("partition", "account", "scratch_dir", "model_dir", "container_image", "container_mounts", "work_dir"),
    *("dataset_path", "trust_dataset", "harness_dir", "client_dir"),
)
# The site's only where no experiment's file says so.
EXPERIMENTS_KEYS = ("gpus_per_node", "segment", "time_limit")


def suggest_site(e: Experiment) -> dict[str, tuple[object, str]]:
    """What is about the site: key -> (value, where it comes from). Given values come first, then what Slurm says."""
    found = {}
    for key in SITE_KEYS + EXPERIMENTS_KEYS:
        value, source = getattr(e, key), e.provenance[key]
        of_site = key in SITE_KEYS or source == "given" or Path(source).name == SITE.name
        if source != "default" and value is not None and of_site:
            found[key] = value, source
    if e.launcher == "slurm":
        with contextlib.suppress(launch.JobError):  # the table of the machine and the cluster says so
            for partition in launch.partitions():
                if partition.is_default:
                    found.setdefault("partition", (partition.name, "sinfo: the default partition"))
            accounts = launch.accounts()
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
        lines = ["# What is about this site; written once by 00_setup, yours to edit. No token belongs here."]
        for key, (value, why) in found.items():
            lines.append(f"{yaml.safe_dump({key: value}, width=1000).strip()}  # {why}")
        with path.open("x") as file:
            file.write("\n".join(lines) + "\n")
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
