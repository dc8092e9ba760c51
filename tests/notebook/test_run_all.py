"""`run` and its kin as a person sees them: rows on a terminal, refusals before the work, words at Ctrl-C."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from test_notebooks import SMALL, command_line

from disagg_lib.cluster import launch
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.run_all import how_to_go_on
from disagg_lib.run.writing import create_run

GIVEN = [
    word
    for name, value in (SMALL | {"test_modes": '["performance"]'}).items()
    for word in ("-p", f"{name}={value}")
]


class Terminal:
    """A command in a terminal of 80 x 24; `text` is all that it has written."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        command = [sys.executable, "-m", "disagg_lib", *map(str, words)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)  # fmt: skip
        os.close(slave)
        self.text = ""

    def read(self, until="\0", timeout_s=180):
        """Read until a word was written, or the command's end; returns its status there."""
        deadline = time.monotonic() + timeout_s
        while until not in self.text:
            assert time.monotonic() < deadline, self.text
            if not select.select([self.master], [], [], 0.5)[0]:
                continue
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # Linux's way to say that nobody writes any more
                return self.process.wait(30)
        return None

    def lines(self):
        """What stood in a row at any time: a carriage return begins the row anew."""
        return [line for row in self.text.replace("\r\n", "\n").split("\n") for line in row.split("\r")]


def test_run_fits_a_terminal_of_80_columns(tmp_path):
    terminal = Terminal("run", "params/rehearsal.yaml", "--run-dir", tmp_path / "run", *GIVEN)
    assert terminal.read() == 0, terminal.text
    long = [line for line in terminal.lines() if len(line) > 80 and str(tmp_path) not in line]
    assert long == []
    rows = [line for line in terminal.lines() if line.startswith("✓")]
    assert [row.split("  ")[0] for row in rows[:5]] == ["✓ 00 setup", "✓ 01 model download", "✓ 03 configuration", "✓ 04 launch", "✓ 05 analysis"]  # fmt: skip
    assert re.search(r"▶ 04 launch performance  \[[# ]{10}\] \d+/60 · [\d,]+ tok/s", terminal.text)
    assert "INVALID (rehearsed" in terminal.text and f"report: {tmp_path / 'run'}" in terminal.text.replace(
        "\r\n", ""
    )


def test_run_refuses_before_it_downloads_or_writes(tmp_path):
    done = command_line(
        "run",
        "params/gb200_20gpu.yaml",
        "-p",
        "scratch_dir",
        tmp_path / "scratch",
        "--run-dir",
        tmp_path / "run",
    )
    assert done.returncode == 1
    assert re.search(r"PreflightError: \d errors?, nothing was downloaded or submitted:", done.stderr)
    assert "slurm:" in done.stderr and "model_folder" not in done.stderr, "01 makes the model's folder"
    assert not any(tmp_path.iterdir())


def test_ctrl_c_while_the_job_runs_says_that_it_goes_on_and_launch_goes_on_with_it(tmp_path):
    run = tmp_path / "run"
    slow = ["-p", "rehearsal_queries=300", "-p", "server_target_qps=30"]
    terminal = Terminal("run", "params/rehearsal.yaml", "--run-dir", run, *GIVEN, *slow)
    terminal.read(until="▶ 04 launch performance  [")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.read() == 130
    job = launch.read_record(run)["job_id"]
    said = terminal.text.replace("\r\n", "")
    assert f"Stopped watching; job {job} goes on. Watch again: disagg attach {run}" in said
    assert "Traceback" not in terminal.text and "Aborted" not in terminal.text
    assert launch.job_state(run).state == "running"
    again = Terminal("launch", run)
    assert again.read() == 0, again.text
    assert launch.read_record(run)["job_id"] == job and (run / "notebooks/05_analysis.html").is_file()


def test_ctrl_c_in_attach_says_that_the_job_goes_on(tmp_path):
    given = SMALL | {"rehearsal_queries": 2000, "server_target_qps": 20.0}
    run = create_run(load_experiment(given=given), tmp_path / "run")
    launch.submit(run)
    terminal = Terminal("attach", run)
    try:
        terminal.read(until="performance")
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.read() == 130
        assert "Stopped watching; job " in terminal.text and "Aborted" not in terminal.text
        assert launch.job_state(run).state == "running"
    finally:
        launch.cancel(run, grace_s=10)


def test_before_a_job_the_words_are_others(tmp_path):
    nothing = how_to_go_on(tmp_path / "run", "01_model_download")
    assert nothing.startswith(
        "Stopped in 01_model_download; nothing was submitted. The same command starts again"
    )
    run = create_run(load_experiment(given=SMALL), tmp_path / "a run")
    assert how_to_go_on(run, "03_configuration").endswith(
        f"nothing was submitted. Go on: disagg launch '{run}'"
    )
