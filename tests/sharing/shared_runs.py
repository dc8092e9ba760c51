"""Runs to share: one with a name of the site in every corner, and a measured one with its system description."""

import json
import re
import shutil
from pathlib import Path

import yaml
from runs import make_run, make_valid_run

from disagg_lib.files import sha256
from disagg_lib.results.logs import ACCURACY

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = {"cells": [{"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "source": "print(run_dir)",
            "outputs": [{"name": "stdout", "output_type": "stream", "text": "OUTPUT"}]}],
            "metadata": {"papermill": {"input_path": "PATH"}}, "nbformat": 4, "nbformat_minor": 5}  # fmt: skip


def site(
    token="hf_Q7abcdefghijklmnopq1234",
    user="zoe_site",
    host="gpu17-rack3",
    path="/lustre/zproj/models",
    account="acc_zeta",
):
    return {"token": token, "user": user, "host": host, "path": path, "account": account}


def make_site_run(folder, site):
    """A run folder in whose every corner a name of the site stands, as job, server and shell would write it."""
    run = make_run(folder)
    token, user, host, path, account = (site[key] for key in ("token", "user", "host", "path", "account"))
    parameters = {"engine": "rehearsal", "account": account, "work_dir": path, "container_mounts": f"{path}:/work,{path}/data:/data",
                  "test_modes": ["performance"], "round": None}  # fmt: skip
    recorded = {
        name: {"value": value, "from": "given" if name in ("account", "work_dir") else "params/site.yaml"}
        for name, value in parameters.items()
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump({"format": 1, "parameters": recorded}))
    (run / "config.yaml").write_text(
        f"hostname: {host}\nmodel: {path}/ckpt\ncontext_servers:\n  urls:\n  - {host}:8336\n"
    )
    (run / "job.sh").write_text(
        f"#!/bin/bash\n#SBATCH --account={account}\nexport HF_TOKEN={token}\ncd /home/{user}/runs\nsrun --nodelist={host} true\n"
    )
    (run / "user.conf").write_text("*.Server.target_qps = 3.85\n")
    (run / "job/nodes.txt").write_text(f"{host}\n{host}.cluster.example\n")
    (run / "job/addresses.txt").write_text(f"orchestrator {host} 8000\n")
    (run / "job/phases.jsonl").write_text(
        '{"time_s": 1000.0, "phase": "bind"}\n{"time_s": 1009.0, "phase": "done"}\n'
    )
    (run / "logs").mkdir()
    (run / "logs/output_workers.log").write_text(
        f"0: loading {path}/ckpt as {user}@{host}\n1: token={token} Authorization: Bearer {token}\n"
        f"srun: error: {host}: task 1: Killed\n2: peer 10.20.30.41:5000, SLURM_JOB_USER={user}, (Account={account})\n"
    )
    notebook = (
        json.dumps(NOTEBOOK)
        .replace("OUTPUT", f"{host}:8000 {path}/x {token}")
        .replace("PATH", f"/home/{user}/repo/05.ipynb")
    )
    (run / "notebooks").mkdir()
    (run / "notebooks/05_analysis.ipynb").write_text(notebook)
    (run / "tables").mkdir()
    (run / "tables/notes.csv").write_text(f'folder,who\n"{path}/runs/1",{user}\n')
    (run / "manifest.json").write_text(
        json.dumps({"versions": {"python": "3.11.2"}, "git": {"commit": "abc123"}})
    )
    return run


def survivors(folder, site):
    """Names of the site that are in any file, or file name, below a folder."""
    found = set()
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        raw = path.read_bytes() + path.relative_to(folder).as_posix().encode()
        found |= {(key, path.name) for key, value in site.items() if value.encode() in raw}
    return found


def make_measured(folder, division="open"):
    """A valid, measured run folder with its evaluation, and a system description."""
    run = make_valid_run(folder / "run")
    (run / "job.sh").write_text("#!/bin/bash\ncd /lustre/zproj/models\n")
    shutil.rmtree(run / "mlperf/test06")
    lines = b",\n".join(
        b'{ "seq_id" : %d, "qsl_idx" : %d, "data" : "%s" }' % (i, i, b"07000000" * 50) for i in range(60)
    )
    (run / "mlperf/accuracy" / ACCURACY).write_bytes(b"[\n" + lines + b"\n]\n")
    path = run / "mlperf/accuracy/accuracy.txt"
    path.write_text(re.sub("hash=.*", f"hash={sha256(run / 'mlperf/accuracy' / ACCURACY)}", path.read_text()))
    system = yaml.safe_load((REPOSITORY / "params/system.example.yaml").read_text())
    system = {key: value or "x" for key, value in system.items()} | {
        "division": division,
        "submitter": "Nobody",
    }
    (folder / "system.yaml").write_text(yaml.safe_dump(system))
    record(run)
    return run, folder / "system.yaml"


def record(run, engine="trtllm"):
    """The digests of the run as it is now, and the checkpoint that 01 verified."""
    files = {p.relative_to(run).as_posix(): sha256(p) for p in run.rglob("*") if p.is_file()}
    checkpoint = {"repo": "nvidia/Llama-3.1-405B-Instruct-FP4", "revision": "abc", "digest": "0" * 64}
    values = {
        "engine": engine,
        "made_with": {"checkpoint": checkpoint},
        "git": {"commit": "abc123"},
        "sha256": files,
    }
    (run / "manifest.json").write_text(json.dumps(values))
