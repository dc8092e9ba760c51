"""The probe: what a compute node has, and what the container image holds, by a job of minutes."""

import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from ..checks import Check
from ..errors import JobError, SetupError
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..run import dynamo
from ..run.job_script import container_options, tensorrt_llm_path
from .setup_job import failed_row, job_header, run_setup_job

ELF_MACHINES = {183: "aarch64", 62: "x86_64"}  # e_machine in an ELF header

PROBE_KEPT_S = 7 * 86400


def _visible(e: Experiment) -> list[str]:
    """Host paths that a compute node must see: run folders, scratch, what is given, mounts, the image's folder."""
    mounts = [pair.partition(":")[0] for pair in (e.container_mounts or "").split(",")]
    image = e.container_image if (e.container_image or "").endswith(".sqsh") else None
    paths = [REPOSITORY, e.scratch_dir, e.dataset_path, e.client_dir, e.harness_dir, *mounts]
    return list(dict.fromkeys(str(path) for path in [*paths, image and Path(image).parent] if path))


def _look_inside(e: Experiment) -> str:
    """Lines that ask TensorRT-LLM, and Dynamo, in the image, as the job's steps will: its version, or the first error."""
    if e.container == "none" or e.engine != "trtllm" or not e.container_image:
        return ""
    path = tensorrt_llm_path(e)
    words = ["srun", f"--mpi={e.mpi}", *container_options(e), "env", *[f"PYTHONPATH={path}"] * bool(path)]
    asked = {"tensorrt_llm": "import tensorrt_llm as t; print('tensorrt_llm', t.__version__)"}
    if e.orchestrator == "dynamo":
        asked["dynamo"] = f"{dynamo.check_code(e)}; print('dynamo', found)"
    lines = ""
    for name, code in asked.items():
        pick = (
            f"/^{name} /{{v = $2}} /rror|ERROR/ && !e {{e = $0}} {{l = $0}} END {{print v ? v : e ? e : l}}"
        )
        command = shlex.join([*words, "python3", "-c", code])
        lines += f'say {name} "$({command} 2>&1 | awk {shlex.quote(pick)})"\n'
    return lines


def probe_script(e: Experiment) -> str:
    """A job of minutes that writes what a compute node has into probe.txt: a name, a tab, a value a line."""
    inside = _look_inside(e)
    limit, options = ("0:20:00", {"mem": "0"}) if inside else ("0:02:00", {})  # tens of GB are unpacked
    return (
        job_header(e, "probe", limit, gpus=e.engine == "trtllm", **options)
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
say mpi "$(srun --mpi=list 2>&1 | paste -sd' ')"
"""
        + inside
        + "say end ''\n"
    )


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
    rows += software_rows(e, found)
    return [Check(f"on {found['host']}: {requirement}", *rest) for requirement, *rest in rows]


def dialect_of(version: str) -> str:
    """The dialect that a TensorRT-LLM speaks: flat keys before 1.1 (the v5.1 branch calls itself 1.0), nested ones from 1.2 on."""
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else ()
    return "none" if not number or (1, 1) <= number < (1, 2) else "v5.1" if number < (1, 1) else "1.x"


def software_rows(e: Experiment, found: Mapping[str, str]) -> list[tuple[str, str, bool, str]]:
    """What a probe found of MPI and of TensorRT-LLM in the image: requirement, found, ok, what to do."""
    rows = []
    if e.launcher == "slurm":
        offered = re.findall(r"\b(?:none|pmi2|pmix)\b", found["mpi"])
        fix = f"set mpi to one of {', '.join(dict.fromkeys(offered)) or 'those that srun --mpi=list names'}"
        rows.append((f"srun offers --mpi={e.mpi}", found["mpi"][:200], e.mpi in offered, fix))
    if version := found.get("tensorrt_llm"):
        speaks = dialect_of(version)
        needed = {"v5.1": "of MLPerf v5.1 (0.20 to 1.0)", "1.x": "1.2 or newer"}[e.trtllm_dialect]
        fix = f"set container_image (or, in v5.1, work_dir and its mount) to a TensorRT-LLM {needed}"
        fix += f", or trtllm_dialect: {speaks}" if speaks != "none" else ""
        what = f"TensorRT-LLM in the container, {needed}: trtllm_dialect is {e.trtllm_dialect}"
        rows.append((what, version[:200], speaks == e.trtllm_dialect, fix))
    if told := found.get("dynamo"):
        fits = told.startswith(f"{e.dynamo_release}.")
        fix = "set container_image to one with Dynamo, or orchestrator: trtllm"
        if re.match(r"[\d.]+$|.*Dynamo is", told):
            fix = "set dynamo_release to the image's, if it is known"
        rows.append((f"Dynamo {e.dynamo_release} and its services in the container", told[:200], fits, fix))
    return rows


def last_probe(e: Experiment, script: str) -> Path | None:
    """Folder of the newest whole probe by this very script, unless it is older than PROBE_KEPT_S."""
    for path in sorted((Path(e.scratch_dir) / "setup").glob("*_probe/probe.txt"), reverse=True):
        if time.time() - path.stat().st_mtime > PROBE_KEPT_S:
            return None
        if (path.parent / "job.sh").read_text() == script and "\nend\t" in path.read_text(errors="replace"):
            return path.parent
    return None


def probe(e: Experiment, out=print) -> list[Check]:
    """What a compute node has, by a job of one node. A whole probe of this week is read again."""
    script = probe_script(e)
    folder = last_probe(e, script)
    if folder:
        out(f"the probe of {folder.name.rpartition('_')[0]} is read again; for a new one remove {folder}")
    return probe_checks(e, read_probe(folder or run_setup_job(e, "probe", script, out=out)))


def node_rows(e: Experiment, out=print) -> list[Check]:
    """A compute node's rows of 00's table; empty with `setup_jobs: none`, or where this machine is the node."""
    if e.launcher == "local" or e.setup_jobs == "none":
        local = "launcher: local: this machine does it all"
        out(local if e.launcher == "local" else "setup_jobs: none: no probe job")
        return []
    try:
        return probe(e, out)
    except (SetupError, JobError) as error:
        return failed_row("probe", error)
