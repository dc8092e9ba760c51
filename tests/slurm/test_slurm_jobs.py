"""Jobs on a real Slurm: they run, they are found again, and every failure is named and gives its nodes back."""

import re
import shutil
import subprocess
import sys
import time

import pytest

from disagg_lib import errors
from disagg_lib.cluster import launch, slurm
from disagg_lib.files import read_json_lines
from disagg_lib.job import deaths

PHASES = [
    "container",
    "bind",
    "workers",
    "orchestrator",
    "ready",
    "warmup",
    "performance",
    "accuracy",
    "teardown",
    "done",
]


def until(run, condition, timeout_s=90, **options):
    """Poll the job's state until condition(state); these tests' watchdog."""
    deadline = time.monotonic() + timeout_s
    while not condition(state := launch.job_state(run, **options)):
        assert time.monotonic() < deadline, f"{state}: {deaths.last_lines(run / launch.SCRIPT_LOG, 20)}"
        time.sleep(0.2)
    return state


def until_phase(run, phase):
    return until(run, lambda state: state.phase == phase or state.ended, ask=False)


def until_ended(run, timeout_s=120):
    return until(run, lambda state: state.ended, timeout_s)


def nodes_are_free(cluster, within_s=30):
    """Whether all 18 nodes are idle, or down, within that time."""
    deadline = time.monotonic() + within_s
    while cluster.run("squeue", "-h", "-t", "R,CG", "-o", "%i").strip():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def phase_names(run):
    return [line["phase"] for line in read_json_lines(run / "job/phases.jsonl")]


def jobs_of(cluster, run):
    """Ids of every job whose comment names this run."""
    lines = cluster.run("squeue", "-h", "-t", "all", "-o", "%i|%k|%Z").splitlines()
    return [line.split("|")[0] for line in lines if line.endswith(str(run))]


@pytest.mark.parametrize("dialect", ["v5.1", "1.x"])
def test_twenty_tasks_on_five_nodes_complete(cluster, make_run, dialect):
    run = make_run(trtllm_dialect=dialect)
    launch.submit(run)
    state = until_ended(run)
    assert (state.state, state.reason) == ("done", "")
    assert phase_names(run) == PHASES
    assert (run / launch.SCRIPT_LOG).read_text().endswith("phase done\n")
    names = (run / "job/nodes.txt").read_text().split()
    assert len(set(names)) == 5
    assert names == sorted(names)
    assert nodes_are_free(cluster)


def test_seventy_two_tasks_on_eighteen_nodes_get_ready_and_serve(cluster, make_run):
    run = make_run(num_ctx_servers=12, num_gen_servers=6, test_modes=["accuracy"], load_timeout_s=110)
    launch.submit(run)
    state = until_ended(run, 150)
    assert (state.state, state.reason) == ("done", "")
    assert len((run / "job/nodes.txt").read_text().split()) == 18


@pytest.mark.parametrize(("partition", "nodes"), [("r1", "gb200-r1-0"), ("nvl", "nvl")])
def test_node_names_that_broke_the_original(make_run, partition, nodes):
    run = make_run(partition=partition, test_modes=["accuracy"])
    launch.submit(run)
    assert until_ended(run).state == "done"
    assert (run / "job/nodes.txt").read_text().startswith(nodes)


def test_two_servers_share_a_node_in_dialect_1x(make_run):
    run = make_run(
        trtllm_dialect="1.x", num_ctx_servers=2, num_gen_servers=1, test_modes=["accuracy"], ctx_tp_size=2
    )
    launch.submit(run)
    assert until_ended(run).state == "done"
    assert len((run / "job/nodes.txt").read_text().split()) == 2


def test_a_server_on_the_wrong_node_fails(make_run):
    run = make_run(num_ctx_servers=1, test_modes=["accuracy"])
    script = (run / "job.sh").read_text()
    (run / "job.sh").write_text(
        script.replace(
            'orchestrator logs/output_server.log step "${NODES[0]}"',
            'orchestrator logs/output_server.log step "${NODES[1]}"',
        )
    )
    launch.submit(run)
    assert re.match(
        r"the orchestrator ended with status \d+: .*cannot listen: this step runs on gb\d+",
        until_ended(run).reason,
    )


# -- one run, one job


def test_submitting_twice_gives_one_job(cluster, make_run):
    run = make_run(num_ctx_servers=1, test_modes=["accuracy"])
    assert launch.submit(run).job_id == launch.submit(run).job_id
    until_ended(run)
    assert launch.submit(run).state == "done"
    assert len(jobs_of(cluster, run)) == 1


def test_a_lost_answer_is_found_again_not_sent_twice(cluster, make_run, tmp_path, monkeypatch):
    run = make_run(num_ctx_servers=1, test_modes=["accuracy"])
    fake = tmp_path / "bin"
    fake.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    (fake / "sbatch").write_text(
        f'#!/bin/bash\n{real} "$@" >/dev/null\necho "Socket timed out on send/recv operation" >&2\nexit 1\n'
    )
    (fake / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{cluster.environment['PATH']}")
    state = launch.submit(run)
    assert state.job_id.isdigit()
    assert jobs_of(cluster, run) == [state.job_id]


def test_a_kernel_killed_between_sbatch_and_its_answer_attaches(cluster, make_run):
    run = make_run(num_ctx_servers=1, test_modes=["accuracy"])
    state = launch.submit(run)
    record = launch.read_record(run)
    launch._write_record(run, record | {"job_id": None})
    assert launch.submit(run).job_id == state.job_id
    assert len(jobs_of(cluster, run)) == 1


def test_a_kernel_killed_while_sbatch_is_under_way_leads_to_one_job(cluster, make_run, tmp_path, monkeypatch):
    run = make_run(num_ctx_servers=1, test_modes=["accuracy"])
    slow = tmp_path / "bin"
    slow.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    (slow / "sbatch").write_text(f'#!/bin/bash\ntouch {slow}/under_way\nsleep 3\nexec {real} "$@"\n')
    (slow / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{cluster.environment['PATH']}")
    code = (
        f"from pathlib import Path; from disagg_lib.cluster import launch; launch.submit(Path({str(run)!r}))"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code])
    cluster.wait("sbatch is under way", (slow / "under_way").exists)
    kernel.kill()
    kernel.wait()
    state = launch.submit(run)
    assert jobs_of(cluster, run) == [state.job_id]


def test_a_refused_submission_leaves_no_job_and_can_be_mended(cluster, make_run):
    run = make_run(partition="nowhere")
    with pytest.raises(errors.JobError, match="not submitted. sbatch: .*invalid partition"):
        launch.submit(run)
    assert launch.job_state(run).state == "not started"


# -- the table fault -> diagnosis

FAULTS = [
    ("crash_loading:ctx2", {}, r"context server ctx2 \(rank 8, node NODE_2\) ended with status \d+: .*ctx2"),
    (
        "crash_loading:gen0",
        {"trtllm_dialect": "1.x"},
        r"generation server gen0 \(rank 16, node NODE_4\) ended with status \d+: .*gen0",
    ),
    ("crash_midrun:gen0:20", {}, r"generation server gen0 \(rank 16, node NODE_4\) ended with status \d+"),
    (
        "crash_midrun:ctx1:5",
        {"trtllm_dialect": "1.x"},
        r"context server ctx1 \(rank 4, node NODE_1\) ended with status \d+",
    ),
    ("health_503", {"load_timeout_s": 8}, r"not ready after load_timeout_s = 8 s"),
    (
        "no_tokens",
        {"stall_timeout_s": 3},
        r"every server answers /health with 200, but for \d+ s .*no completion came through: .*no error in it",
    ),
    ("truncated_stream:5", {}, r"the performance client ended with status \d+: .*cut"),
    (
        "gen_refuses:gen0:60",
        {"rehearsal_queries": 400},
        r"the performance client ended with status 1: .*sample \d+: ",
    ),
    (
        "gen_refuses:gen0:60",
        {"rehearsal_queries": 400, "trtllm_dialect": "1.x"},
        r"the performance client ended with status 1: .*sample \d+: ",
    ),
    (
        "no_request_id",
        {"stall_timeout_s": 3, "trtllm_dialect": "1.x"},
        r"every server answers /health with 200, but for \d+ s .*status 500: .*disagg_request_id is None",
    ),
]


def with_nodes(run, reason):
    names = (run / "job/nodes.txt").read_text().split()
    return re.sub(r"NODE_(\d)", lambda match: names[int(match[1])], reason)


@pytest.mark.parametrize(("fault", "given", "reason"), FAULTS)
def test_a_fault_of_the_servers_is_named(cluster, make_run, fault, given, reason):
    run = make_run(fault=fault, test_modes=["performance"], **given)
    launch.submit(run)
    state = until_ended(run)
    assert state.state == "failed"
    assert re.match(with_nodes(run, reason), state.reason), state.reason
    assert nodes_are_free(cluster)
    # The controller tells slurmdbd when it has time.
    asked = "sacct", "-nPX", "-j", state.job_id, "-o", "State"
    cluster.wait("the accounting says FAILED", lambda: cluster.run(*asked).split() == ["FAILED"])


QUIET = [
    (
        "crash_loading_quiet:ctx2",
        "v5.1",
        90,
        r"context server ctx2 \(rank 8, node NODE_2\) wrote an error, then nothing for 60 s, and does not answer "
        r"/health: 8: .*out of memory",
    ),
    (
        "crash_midrun_quiet:gen0:60",
        "1.x",
        30,
        r"generation server gen0 \(rank 16, node NODE_4\) was well and does not answer /health any more; its step "
        r"lives on: 16: .*died after",
    ),
]


@pytest.mark.parametrize(("fault", "dialect", "within_s", "reason"), QUIET)
def test_a_server_that_dies_while_its_step_lives_is_named_in_time(
    cluster, make_run, fault, dialect, within_s, reason
):
    slow = {"server_target_qps": 2, "rehearsal_queries": 400, "test_modes": ["performance"]}
    run = make_run(fault=fault, trtllm_dialect=dialect, load_timeout_s=3600, **slow)
    launch.submit(run)
    log = run / "logs/output_workers.log"
    until(run, lambda state: log.exists() and "(fault " in log.read_text(), ask=False)
    died = time.monotonic()
    state = until_ended(run)
    assert time.monotonic() - died < within_s
    assert re.match(with_nodes(run, reason), state.reason), state.reason
    assert nodes_are_free(cluster, 30)


def test_what_serves_and_measures_is_looked_for_before_anything_is_loaded(cluster, make_run):
    """The test cluster's nodes have no TensorRT-LLM."""
    run = make_run(engine="trtllm", container="none", test_modes=["performance"])
    launch.submit(run)
    state = until_ended(run)
    assert re.match(r"container ended with status \d+: .*No module named 'tensorrt_llm'", state.reason), state
    assert phase_names(run)[:-2] == ["container"]
    external = {"engine": "external", "endpoint_url": "http://127.0.0.1:9", "test_modes": ["performance"]}
    run = make_run(**external, client_dir="/nowhere")
    script = run / "job.sh"  # this machine's own python3 may have LoadGen
    script.write_text(script.read_text().replace(" python3 -c", " python3 -I -S -c"))
    launch.submit(run)
    reason = until_ended(run).reason
    assert re.match(r"container_client ended with status \d+: .*No module named 'mlperf_loadgen'", reason)


def long_run(make_run, **given):
    run = make_run(**{"rehearsal_queries": 4000, "test_modes": ["performance"]} | given)  # 100 s
    launch.submit(run)
    until(run, lambda state: state.ended or (state.progress or {}).get("mode") == "performance", ask=False)
    return run


def test_a_worker_killed_while_loading_fails_within_five_seconds(cluster, make_run):
    run = make_run(fault="crash_loading:ctx0", test_modes=["performance"])
    launch.submit(run)
    until(
        run,
        lambda state: (
            "Error"
            in (
                text := (run / "logs/output_workers.log").read_text()
                if (run / "logs/output_workers.log").exists()
                else ""
            )
            or "crash" in text
        ),
        ask=False,
    )
    died = time.monotonic()
    until_ended(run, 20)
    assert time.monotonic() - died < 5
    assert nodes_are_free(cluster, 30)


def test_a_stall_is_named_after_the_configured_time(cluster, make_run):
    run = long_run(make_run, stall_timeout_s=3)
    until(run, lambda state: (state.progress or {}).get("tokens", 0) > 0, ask=False)
    subprocess.run(["pkill", "-STOP", "-f", f"disaggregated_mpi_worker -c {run}"], check=True)
    try:
        stopped = time.monotonic()
        state = until_ended(run, 60)
        assert (
            time.monotonic() - stopped < 3 + 5 + 5
        )  # the stall time, 5 s, and teardown of stopped processes
    finally:
        subprocess.run(["pkill", "-CONT", "-f", f"disaggregated_mpi_worker -c {run}"], check=False)
    assert state.reason.startswith("stalled: no token for")
    assert nodes_are_free(cluster)


def test_scancel_is_named_and_teardown_ran(cluster, make_run):
    run = long_run(make_run)
    cluster.run("scancel", launch.job_state(run).job_id)
    state = until_ended(run)
    assert state.reason.startswith("cancelled"), state.reason
    assert "teardown" in phase_names(run)
    assert nodes_are_free(cluster)


def test_our_cancel_is_named_and_frees_the_nodes(cluster, make_run):
    run = long_run(make_run)
    assert launch.cancel(run).reason.startswith("cancelled (signal TERM) during performance")
    assert nodes_are_free(cluster)


def test_a_queued_job_says_its_place_and_can_be_cancelled(cluster, make_run):
    blocker = cluster.run(
        "sbatch",
        "--parsable",
        "-N18",
        "--exclusive",
        "-A",
        "mlperf",
        "--wrap",
        "sleep 300",
        "-o",
        "/dev/null",
    ).strip()
    cluster.wait(
        "the blocker runs",
        lambda: cluster.run("squeue", "-h", "-j", blocker, "-o", "%T").strip() == "RUNNING",
    )
    run = make_run()
    launch.submit(run)
    state = until(run, lambda state: "(Resources)" in state.note or "(Priority)" in state.note)
    assert state.state == "queued"
    assert state.note.startswith("place 1 of 1 in the queue")
    assert launch.cancel(run).reason.startswith("CANCELLED: cancelled by a user")


def test_the_time_limit_is_named(cluster, make_run):
    # Slurm looks at limits every 30 s, and may send the signal that is due at 2 minutes up to 60 s before
    run = long_run(make_run, time_limit="0:04:00", rehearsal_queries=8000)
    state = until_ended(run, 240)
    assert state.reason.startswith("time limit during performance"), state.reason
    assert nodes_are_free(cluster)


def test_a_failed_node_is_named(cluster, make_run):
    run = long_run(make_run)
    node = (run / "job/nodes.txt").read_text().split()[3]
    cluster.stop_node(node)
    try:
        state = until_ended(run, 90)
        assert re.match(
            r"node failure during performance, after \d+ s: " + node + r" is down|NODE_FAIL", state.reason
        ), state.reason
        assert nodes_are_free(cluster)
    finally:
        cluster.start_node(node)


def test_a_requeued_job_refuses_the_used_folder(cluster, make_run):
    run = long_run(make_run)
    job = launch.job_state(run).job_id
    cluster.run("scontrol", "update", f"jobid={job}", "requeue=1")
    cluster.run("scontrol", "requeue", job)
    state = until_ended(run, 60)
    assert state.reason.startswith("requeued during performance"), state.reason
    cluster.wait(
        "the restart ended", lambda: cluster.run("squeue", "-h", "-j", job, check=False).strip() == "", 150
    )
    assert "used before" in (run / launch.SCRIPT_LOG).read_text()
    assert phase_names(run).count("workers") == 1


def test_a_controller_that_is_down_never_reads_as_an_end(cluster, make_run):
    run = long_run(make_run)
    cluster.stop_controller()
    try:
        notes = set()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            state = launch.job_state(run)
            assert not state.ended
            notes.add(state.note.split(" (")[0])
        assert "Slurm does not answer" in notes
    finally:
        cluster.start_controller()
        cluster.wait("the controller is up", lambda: "is UP" in cluster.run("scontrol", "ping", check=False))
    assert launch.cancel(run).state == "failed"
    assert nodes_are_free(cluster)


def test_a_killed_client_is_named(cluster, make_run):
    run = long_run(make_run)
    subprocess.run(["pkill", "-KILL", "-f", f"program client --run-dir {run}"], check=True)
    state = until_ended(run)
    assert re.match(r"the performance client ended with status (137|9)", state.reason), state.reason
    assert nodes_are_free(cluster)


def test_a_full_disk_still_gets_its_last_word(cluster, make_run):
    made = make_run(num_ctx_servers=1, rehearsal_queries=4000, test_modes=["performance"])
    run = cluster.folder / "small" / "run"
    shutil.copytree(made, run)
    launch.submit(run)
    until(run, lambda state: (state.progress or {}).get("tokens", 0) > 0, ask=False)
    subprocess.run(["dd", "if=/dev/zero", f"of={run}/filler", "bs=64k"], capture_output=True)
    state = until_ended(run, 60)
    assert state.state == "failed"
    assert re.search(r"No space left|stalled|ended with status", state.reason), state.reason
    assert nodes_are_free(cluster)


def test_a_batch_script_killed_outright_is_lost_with_slurms_word(cluster, make_run):
    run = long_run(make_run)
    job = launch.job_state(run).job_id
    cluster.run("scancel", "--full", "--signal=KILL", job)
    state = until_ended(run, 60)
    assert state.state in ("lost", "failed")
    assert re.match(r"(CANCELLED|FAILED|COMPLETED|cancelled)", state.reason), state.reason
    assert nodes_are_free(cluster)


def test_every_state_of_sacct_has_a_meaning():
    documented = subprocess.run(["man", "-P", "cat", "sacct"], capture_output=True, text=True).stdout
    named = set(re.findall(r"^\s+(?:[A-Z]{1,3})\s{2,}([A-Z_]+)\s", documented, re.M)) or {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING", "PREEMPTED",
        "RUNNING", "REQUEUED", "RESIZING", "REVOKED", "SUSPENDED", "TIMEOUT",
    }  # fmt: skip
    assert named <= set(slurm.SLURM_STATES)
