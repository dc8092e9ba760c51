"""Setup on a cluster: the probe of a compute node, the container image, the client's environment, params/site.yaml.

Each is a job of one node with a folder of its own, `<scratch_dir>/setup/<time>_<kind>/`: job.sh, output.txt and
what it found. The texts are pure functions of the Experiment; `run_setup_job` submits and follows them.

SetupError    a setup job failed, or cannot be made from these parameters
"""

import datetime
import hashlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from . import launch
from .errors import DisaggError
from .experiment import REPOSITORY, Experiment
from .job_agent import last_lines
from .preflight import Check, _pinned_versions
from .run_folder import Table

SITE = REPOSITORY / "params/site.yaml"
_NEWLINE = "\\n"  # as printf reads it
ELF_MACHINES = {183: "aarch64", 62: "x86_64"}  # e_machine in an ELF header
ENDED_WELL = launch.SLURM_STATES["COMPLETED"][1]
PROBE_KEPT_S = 7 * 86400
CLIENT_PACKAGES = ("mlcommons-loadgen", "numpy", "uvloop")


class SetupError(DisaggError):
    """A setup job failed, or cannot be made from these parameters."""


# -- the scripts


def _header(e: Experiment, kind: str, time_limit: str, gpus: bool = True) -> str:
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name=disagg_setup_{kind}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
    ]
    if gpus and e.engine != "external":
        lines.append(f"#SBATCH --gpus-per-node={e.gpus_per_node}")
    lines.append(f"#SBATCH --time={time_limit}")
    lines += [f"#SBATCH --{key}={value}" for key in ("partition", "account") if (value := getattr(e, key))]
    lines += ["#SBATCH --output=output.txt", "#SBATCH --no-requeue"]
    return "\n".join(lines) + "\n" + PREAMBLE


# The status goes into a file: accounting may be absent, and squeue forgets. Variables that would redirect the harness
# are facts of the v5.1 code; tokens are nobody's business on a compute node.
PREAMBLE = """# shellcheck disable=SC2016,SC2329 # quoted values stay as they are; traps call functions
set -uo pipefail
cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "$0")}" || exit 1
JOB=$PWD
trap 'echo "$?" >"$JOB/status"' EXIT
trap 'exit 143' TERM
unset LOG_DIR MODEL_DIR DATA_DIR PREPROCESSED_DATA_DIR BUILD_DIR CONFIG_DIR ARTIFACTS_DIR
unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN
"""


def _mounts(e: Experiment) -> list[str]:
    """Host paths that a compute node must see: scratch, mounts, and where the image is or will be."""
    hosts = [pair.partition(":")[0] for pair in (e.container_mounts or "").split(",") if pair]
    image = e.container_image if (e.container_image or "").endswith(".sqsh") else None
    return list(dict.fromkeys([e.scratch_dir, *hosts, *([str(Path(image).parent)] if image else [])]))


def probe_script(e: Experiment) -> str:
    """A job of two minutes that writes what a compute node has into probe.txt: a name, a tab, a value a line."""
    return (
        _header(e, "probe", "0:02:00", gpus=e.engine == "trtllm")
        + f"""
scratch={shlex.quote(e.scratch_dir)}
say() {{ printf '%s\\t%s\\n' "$1" "$2" >>probe.txt; }}
say host "$(hostname)"
say arch "$(uname -m)"
say python3 "$(python3 -c 'import platform; print(platform.python_version())' 2>&1)"
say gpus "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | paste -sd';')"
say fabric "$(nvidia-smi -q 2>&1 | awk '/ClusterUUID|CliqueId/ {{ print $NF }}' | paste -sd' ')" # a pair a GPU
say pyxis "$(srun --help 2>&1 | grep -c -e --container-image)"
for path in {shlex.join(_mounts(e))}; do
  if [[ -r $path ]]; then say "path $path" readable; else say "path $path" 'not readable'; fi
done
if own=$(mktemp -p "$scratch" .probe-XXXXXX 2>&1); then rm -- "$own" && say scratch writable; else say scratch "$own"; fi
say free_kb "$(df -Pk -- "$scratch" 2>&1 | awk 'NR == 2 {{ print $4 }}')"
say end ''
"""
    )


def image_script(e: Experiment, arch: str = "aarch64") -> str:
    """The job that builds `container_image` with the harness's makefile, and leaves `<image>.sha256` beside it.

    From the v5.1 code: the makefile lies in closed/NVIDIA itself (the original's README says one folder below),
    needs --container-remap-root, and asks: for the account, if none is given, then whether to go on.

    Raises
    ------
    SetupError : harness_dir, container_image or partition is not given, or the makefile is not there.
    """
    for key in ("harness_dir", "container_image", "partition"):
        if not getattr(e, key):
            raise SetupError(f"{key}: not given, and the image job needs it. Set it in params/site.yaml")
    if not (Path(e.harness_dir) / "Makefile.pyxis").is_file():
        raise SetupError(
            f"harness_dir: {e.harness_dir} has no Makefile.pyxis. Needed: the v5.1 tree's closed/NVIDIA"
        )
    if not e.container_image.endswith(".sqsh"):
        raise SetupError(
            f"container_image: found {e.container_image!r}, needed the path of the .sqsh file to make"
        )
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
    return (
        _header(e, "image", e.time_limit)
        + f"""
image={shlex.quote(e.container_image)}
draft=${{image%.sqsh}}.draft-${{SLURM_JOB_ID:-$$}}.sqsh # it gets its name when it is whole
[[ -e $image ]] && echo "$image is there already, and nothing is overwritten" && exit 1
cd -- {shlex.quote(e.harness_dir)} || exit 1
printf '{"" if e.account else _NEWLINE}y{_NEWLINE}' | make -f Makefile.pyxis build_base_sqsh "SBATCH_CONTAINER_SAVE=$draft" \\
  {shlex.join(f"{key}={value}" for key, value in values.items())} || exit 1
[[ $(head -c 4 -- "$draft") == hsqs ]] || {{ echo "$draft is no squashfs image"; exit 1; }}
digest=$(sha256sum <"$draft") || exit 1
mv -n -- "$draft" "$image"
[[ -e $draft ]] && echo "$image came from elsewhere meanwhile; ours is $draft" && exit 1
printf '%s  %s\\n' "${{digest%% *}}" "${{image##*/}}" >"$image.sha256"
"""
    )


def client_folder(e: Experiment) -> Path:
    """Where the client's environment for compute nodes is built."""
    return Path(e.scratch_dir) / "client_env"


def client_script(e: Experiment, wheels: str | None = None) -> str:
    """The job that installs LoadGen (built from its source package), numpy and uvloop into `client_folder`.

    Parameters
    ----------
    wheels : folder of packages brought along (`pip download`), for nodes without internet; then nothing else is asked.
    """
    packages = [f"{name}=={_pinned_versions()[name]}" for name in CLIENT_PACKAGES]
    source = ["--no-index", "--find-links", wheels] if wheels else ["--no-binary", "mlcommons-loadgen"]
    step = ""
    if e.launcher == "slurm" and e.container == "pyxis":
        pairs = [f"{path}:{path}" for path in (e.scratch_dir, wheels) if path]
        pairs += (e.container_mounts or "").split(",") if e.container_mounts else []
        mounts = ",".join(dict.fromkeys(pairs))
        step = shlex.join(
            [
                "srun",
                f"--container-image={e.container_image}",
                f"--container-mounts={mounts}",
                "--container-remap-root",
            ]
        )
    return (
        _header(e, "client", "0:30:00")
        + f"""
target={shlex.quote(str(client_folder(e)))}
draft=$target.draft-${{SLURM_JOB_ID:-$$}}
[[ -e $target ]] && echo "$target is there already, and nothing is overwritten" && exit 1
ended() {{
  echo "$?" >"$JOB/status"
  rm -rf -- "$draft"
}}
trap ended EXIT
step() {{ {step} "$@"; }}
step python3 -m pip install --no-input --disable-pip-version-check --no-cache-dir --target "$draft" \\
  {shlex.join([*source, *packages])} || exit 1
# Five seconds of LoadGen, from that folder
step env PYTHONPATH="$draft" python3 "$PWD/check_client.py" "$PWD/check" | tee check.json || exit 1
mv -T -- "$draft" "$target"
"""
    )


CHECK_CLIENT = '''"""Five seconds of LoadGen with a server that answers at once: prints versions and LoadGen's verdict as JSON."""

import json
import os
import platform
import sys

import mlperf_loadgen as lg
import numpy

folder = sys.argv[1]
os.makedirs(folder)
settings = lg.TestSettings()
settings.scenario, settings.mode = lg.TestScenario.Server, lg.TestMode.PerformanceOnly
settings.server_target_qps, settings.min_duration_ms, settings.server_target_latency_ns = 200.0, 5000, 10**9
output, log = lg.LogOutputSettings(), lg.LogSettings()
output.outdir = folder
log.log_output, log.enable_trace = output, False
sut = lg.ConstructSUT(
    lambda queries: lg.QuerySamplesComplete([lg.QuerySampleResponse(q.id, 0, 0) for q in queries]), lambda: None
)
qsl = lg.ConstructQSL(100, 100, lambda samples: None, lambda samples: None)
lg.StartTestWithLogSettings(sut, qsl, settings, log)
lg.DestroyQSL(qsl)
lg.DestroySUT(sut)
with open(os.path.join(folder, "mlperf_log_summary.txt")) as file:
    verdict = [line.split()[-1] for line in file if line.startswith("Result is")]
try:
    import uvloop
except ImportError:
    uvloop = None
print(
    json.dumps(
        {
            "result": verdict[0] if verdict else "none",
            "loadgen_from": os.path.dirname(lg.__file__),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "numpy": numpy.__version__,
            "uvloop": getattr(uvloop, "__version__", None),
        }
    )
)
sys.exit(verdict != ["VALID"])
'''


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
    SetupError : it ended with a status other than 0, with its last lines.
    JobError : Slurm refused it.
    """
    folder = Path(e.scratch_dir) / "setup" / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}_{kind}"
    folder.mkdir(parents=True)
    for name, text in {"job.sh": script, **(files or {})}.items():
        (folder / name).write_text(text)
    output, status = folder / "output.txt", folder / "status"
    if e.launcher == "local":
        with output.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "job.sh"],
                cwd=folder,
                env=launch._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        state, cancel = _local_state(process), process.terminate
    else:
        answer = launch.slurm(
            "sbatch", "--parsable", "job.sh", tries=1, cwd=folder, environment=launch._environment()
        )
        job_id = answer.strip().split(";")[0]
        state, cancel = _slurm_state(job_id), lambda: launch.slurm("scancel", job_id)
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


def _local_state(process: subprocess.Popen) -> Callable[[], tuple[bool, str]]:
    return lambda: (True, ENDED_WELL) if process.poll() is not None else (False, "running")


def _slurm_state(job_id: str) -> Callable[[], tuple[bool, str]]:
    def state() -> tuple[bool, str]:
        try:
            word, why = launch._slurm_state(job_id)
        except launch.NoAnswer as silence:
            return False, str(silence)
        ended, meaning = launch.SLURM_STATES.get(word, (not word, word))  # '': Slurm has forgotten it
        return ended, meaning + (f" ({why})" if why and not ended else "")

    return state


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
        one = len(domains) == 1 and "N/A" not in min(domains)
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
    writable = found["scratch"] == "writable"
    rows.append(
        ("scratch_dir is writable", found["scratch"], writable, "set scratch_dir to a shared folder of yours")
    )
    free_gb = int(found["free_kb"]) * 1024 / 1e9 if found["free_kb"].isdigit() else 0.0
    rows.append(
        ("1 GB free in scratch_dir", f"{free_gb:.0f} GB", free_gb >= 1, "free some, or set scratch_dir")
    )
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
    """What a compute node has, by a job of one node and two minutes at most. A whole probe of this week is read again.

    Raises
    ------
    SetupError, JobError
    """
    script = probe_script(e)
    folder = _last_probe(e, script)
    if folder:
        out(f"the probe of {folder.name.rpartition('_')[0]} is read again; for a new one remove {folder}")
    return probe_checks(e, read_probe(folder or run_setup_job(e, "probe", script, out=out)))


def _image_arch(image: Path) -> str:
    """Architecture of a program in the image, from its ELF header."""
    if shutil.which("unsquashfs") is None:
        return "not looked at: unsquashfs (package squashfs-tools) is absent"
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(
            ["unsquashfs", "-no-xattrs", "-d", f"{place}/root", str(image), "usr/bin/env"],
            capture_output=True,
            timeout=120,
        )
        program = Path(place) / "root/usr/bin/env"
        head = program.read_bytes()[:20] if program.is_file() else b""
    if head[:4] != b"\x7fELF":
        return "no usr/bin/env in it"
    machine = int.from_bytes(head[18:20], "little")
    return ELF_MACHINES.get(machine, f"ELF machine {machine}")


def image_checks(image: str | Path, arch: str = "aarch64", min_gb: float = 1.0) -> list[Check]:
    """Whether a file is an enroot image for this architecture."""
    image, fix = Path(image), "build it (00_setup), or set container_image to one that is"
    if not image.is_file():
        return [Check("container_image is there", f"no file {image}", False, fix)]
    with image.open("rb") as file:
        magic = file.read(4)
    size_gb, found = image.stat().st_size / 1e9, _image_arch(image) if magic == b"hsqs" else "not looked at"
    return [
        Check("container_image is a squashfs image", repr(magic), magic == b"hsqs", fix),
        Check(
            f"container_image has {min_gb} GB or more",
            f"{size_gb:.2f} GB",
            size_gb >= min_gb,
            f"it was cut short: {fix}",
        ),
        Check(f"container_image is for {arch}", found, found == arch, fix),
    ]


def build_image(e: Experiment, arch: str = "aarch64", out=print, min_gb: float = 1.0) -> list[Check]:
    """Build container_image unless it is there, and check it.

    Raises
    ------
    SetupError, JobError
    """
    if not (e.container_image and Path(e.container_image).exists()):
        run_setup_job(e, "image", image_script(e, arch), out=out)
    return image_checks(e.container_image, arch, min_gb)


def cite_image(image: str | Path) -> dict | None:
    """What a run's manifest says of the image; None without `<image>.sha256` beside it."""
    path = Path(f"{image}.sha256")
    return {"path": str(image), "sha256": path.read_text().split()[0]} if path.is_file() else None


def build_client(e: Experiment, wheels: str | None = None, out=print) -> dict:
    """Build the client's environment on a compute node unless it is there; returns its path, versions and digest.

    Raises
    ------
    SetupError, JobError
    """
    folder = client_folder(e)
    if not folder.exists():
        job = run_setup_job(e, "client", client_script(e, wheels), {"check_client.py": CHECK_CLIENT}, out=out)
        checked = json.loads((job / "check.json").read_text().splitlines()[-1])
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        lines = "".join(
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in files
        )
        pins = _pinned_versions()
        value = {"path": str(folder), "mlcommons-loadgen": pins["mlcommons-loadgen"], **checked}
        (folder / "client_env.json").write_text(
            json.dumps(value | {"digest": hashlib.sha256(lines.encode()).hexdigest()}, indent=1) + "\n"
        )
    cited = cite_client(folder)
    if cited is None:
        raise SetupError(f"{folder}: not made by 00_setup, or cut short. Remove it and run this again")
    return cited


# -- what 00_setup does, as `setup_jobs` allows


def node_rows(e: Experiment, out=print) -> list[Check]:
    """A compute node's rows of 00's table; empty with `setup_jobs: none`, or where this machine is the node.

    Raises
    ------
    SetupError, JobError
    """
    if e.launcher == "local" or e.setup_jobs == "none":
        out(
            "launcher: local: this machine does it all"
            if e.launcher == "local"
            else "setup_jobs: none: no probe job"
        )
        return []
    return probe(e, out)


def image_rows(e: Experiment, out=print) -> list[Check]:
    """The image's rows; `setup_jobs: all` builds an absent one first. Empty without a container, or for a registry's name.

    Raises
    ------
    SetupError, JobError
    """
    image = e.container_image or ""
    if e.container == "none" or (image and not image.endswith(".sqsh")):
        return []
    looked_at = _last_probe(e, probe_script(e))
    arch = read_probe(looked_at)["arch"] if looked_at else "aarch64"  # a GB200's
    if e.setup_jobs == "all":
        return build_image(e, arch, out)
    return image_checks(image or "container_image, which is not given", arch)


def client_rows(e: Experiment, out=print) -> list[Check]:
    """The row of the client's environment for compute nodes; `setup_jobs: all` builds an absent one first.

    Raises
    ------
    SetupError, JobError
    """
    if e.engine == "rehearsal" or e.launcher == "local" or e.client != "loadgen":
        return []
    if e.setup_jobs == "all" and not e.client_dir:
        build_client(e, out=out)
    folder = Path(e.client_dir or client_folder(e))
    cited = cite_client(folder)
    found = (
        f"{folder}: LoadGen {cited['mlcommons-loadgen']}, {cited['machine']}"
        if cited
        else f"none in {folder}"
    )
    return [
        Check(
            "client_dir holds LoadGen and numpy for the nodes",
            found if e.client_dir or not cited else f"{found}, but client_dir does not name it",
            bool(cited and e.client_dir),
            f"set client_dir: {folder} in params/site.yaml"
            if cited
            else "set setup_jobs: all to build it, or go on if the container brings LoadGen and numpy",
            level="warning",
        )
    ]


def cite_client(folder: str | Path) -> dict | None:
    """What a run's manifest says of the client's environment: path, versions, digest; None if 00_setup did not build it."""
    record = Path(folder) / "client_env.json"
    return json.loads(record.read_text()) if record.is_file() else None


# -- params/site.yaml


SITE_KEYS = (
    *("partition", "account", "scratch_dir", "model_dir", "container_image", "container_mounts", "work_dir"),
    *("dataset_path", "trust_dataset", "harness_dir", "client_dir", "gpus_per_node", "segment", "time_limit"),
)


def suggest_site(e: Experiment) -> dict[str, tuple[object, str]]:
    """What is about the site: key -> (value, where it comes from). Given values come first, then what Slurm says."""
    found = {
        key: (getattr(e, key), e.provenance[key])
        for key in SITE_KEYS
        if e.provenance[key] != "default" and getattr(e, key) is not None
    }
    if e.launcher == "slurm":
        for partition in launch.partitions():
            if partition.is_default:
                found.setdefault("partition", (partition.name, "sinfo: the default partition"))
        accounts = launch.accounts()
        if len(accounts) == 1:
            found.setdefault("account", (accounts[0], "sacctmgr: your only account"))
    if cite_client(client_folder(e)):
        found.setdefault("client_dir", (str(client_folder(e)), "built by 00_setup"))
    return found


def write_site(found: Mapping[str, tuple[object, str]], path: Path = SITE, write: bool = True) -> Table:
    """Write params/site.yaml if there is none (and `write`); in any case the difference: key, in the file, found, from."""
    if write and found and not path.exists():
        lines = ["# What is about this site; written once by 00_setup, yours to edit. No token belongs here."]
        lines += [
            f"{yaml.safe_dump({key: value}, width=1000).strip()}  # {why}"
            for key, (value, why) in found.items()
        ]
        with path.open("x") as file:
            file.write("\n".join(lines) + "\n")
    there = yaml.safe_load(path.read_text()) or {} if path.exists() else {}
    rows = [
        {
            "key": key,
            "in the file": there.get(key),
            "found": found.get(key, (None,))[0],
            "from": found.get(key, (None, ""))[1],
        }
        for key in dict.fromkeys([*there, *found])
    ]
    return Table(rows, columns=["key", "in the file", "found", "from"])
