"""The agent's parts, called as the job script calls them: names, reasons, the watchdog, the janitor, the orchestrator's CPU."""

import json
import signal
import subprocess
import time

import pytest
import yaml
from agent_room import AgentRoom

from disagg_lib.job.deaths import told


@pytest.fixture
def room(tmp_path):
    return lambda **given: AgentRoom(tmp_path, **given)


def until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["1234", "on", "null", "gb01"])
def test_a_nodes_name_stays_text_in_yaml(room, name):
    here = room(launcher="slurm", num_ctx_servers=1)
    here.command("scontrol", f"printf '%s\\n' {name} {name}b")
    here.agent("bind", SLURM_JOB_NODELIST="x")
    bound = yaml.safe_load((here.run / "job/config.bound.yaml").read_text())
    assert bound["hostname"] == name and bound["context_servers"]["urls"] == [f"{name}:8336"]


LOGS = {
    "pyxis": (
        "pyxis: importing docker image\nslurmstepd: error: pyxis:     [ERROR] couldn't chdir to /work\nslurmstepd: error: a\n"
        "slurmstepd: error: container was not started successfully by another task\nsrun: error: b\nsrun: error: c\n",
        "slurmstepd: error: pyxis:     [ERROR] couldn't chdir to /work | srun: error: c",
    ),
    "client": (
        "loadgen_client performance: request failed: sample 3: server_error: EngineCore encountered an issue\n"
        + "loadgen_client performance: request failed: sample 9: refused: Connection refused\n" * 90
        + "loadgen_client performance: 3 of 94 requests served: INVALID\n",
        "sample 3: server_error: EngineCore encountered an issue | loadgen_client performance: request failed: sample 9",
    ),
    "python": (
        "Traceback (most recent call last):\n  File x\nRuntimeError: no such tokenizer\nbye\n",
        "RuntimeError: no such tokenizer | bye",
    ),
    "no word": ("a\nb\nc\nd\n", "b | c | d"),
}


@pytest.mark.parametrize(("text", "words"), LOGS.values(), ids=LOGS)
def test_a_reason_begins_with_the_first_line_that_tells_why(tmp_path, text, words):
    (tmp_path / "log").write_text(text)
    assert words in told(tmp_path / "log")


def test_a_rank_is_quoted_alone(tmp_path):
    (tmp_path / "log").write_text("10: RuntimeError: a\n1: RuntimeError: b\n 1: end\n11: c\n")
    assert told(tmp_path / "log", mark="1:") == "1: RuntimeError: b | 1: end"


@pytest.fixture
def node(room, tmp_path):
    """A node on which job 7 runs; job 6 has ended, job 8 has not; enroot keeps its containers in a folder."""
    here = room()
    here.kept = tmp_path / "kept"
    here.kept.mkdir()
    names = (
        "disagg_405B_6",
        "6_disagg_405B_6",
        "disagg_405B_7",
        "7_disagg_405B_7",
        "disagg_405B_8",
        "other_6",
    )
    for name in names:
        (here.kept / f"pyxis_{name}").touch()
    here.command("enroot", f'case $1 in list) ls {here.kept} ;; remove) rm -- "{here.kept}/$3" ;; esac')
    here.command("sinfo", "echo up")
    here.command("squeue", '[[ $* == *--jobs=8* ]] && echo "8 running"')
    return here


def kept(here):
    return sorted(path.name.removeprefix("pyxis_") for path in here.kept.iterdir())


def test_the_janitor_removes_what_ended_jobs_left_and_at_its_end_its_own(node):
    janitor = node.start("janitor", SLURM_JOB_ID="7")
    until(lambda: len(kept(node)) == 4)
    assert kept(node) == ["7_disagg_405B_7", "disagg_405B_7", "disagg_405B_8", "other_6"]
    time.sleep(0.5)
    janitor.send_signal(signal.SIGTERM)
    until(lambda: len(kept(node)) == 2)
    (node.kept / "pyxis_disagg_405B_7").touch()  # was being unpacked
    assert janitor.wait(20) == 0
    assert kept(node) == ["disagg_405B_8", "other_6"]


def test_the_janitor_leaves_others_alone_where_slurm_does_not_answer(node):
    node.command("sinfo", "exit 1")
    assert node.agent("janitor", "end", SLURM_JOB_ID="7") == ""
    assert kept(node) == ["6_disagg_405B_6", "disagg_405B_6", "disagg_405B_8", "other_6"]
    janitor = node.start("janitor", SLURM_JOB_ID="9")
    time.sleep(1)
    janitor.send_signal(signal.SIGTERM)
    assert janitor.wait(20) == 0 and len(kept(node)) == 4


def test_a_janitor_without_enroot_says_so_and_harms_nothing(node):
    (node.commands / "enroot").unlink()
    assert "enroot" in node.agent("janitor", "end", SLURM_JOB_ID="7")


def test_the_orchestrators_cpu_time_is_sampled_from_proc(room, tmp_path):
    here = room()
    busy = "import sys\nwhile True: pass"
    config = str(here.run / "job/config.bound.yaml")
    process = subprocess.Popen(["python3", "-c", busy, "disaggregated", "-c", config])
    code = (
        "import sys, time; sys.dont_write_bytecode = True; sys.path.insert(0, 'job')\n"
        "from program.orchestrator_cpu import OrchestratorCpu; cpu = OrchestratorCpu('performance')\n"
        "for _ in range(6): cpu.sample(); time.sleep(0.5)\n"
    )
    try:
        subprocess.run(["python3", "-c", code], cwd=here.run, check=True, timeout=30)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (here.run / "job/orchestrator.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["cpu_s"] > lines[0]["cpu_s"] >= 0
