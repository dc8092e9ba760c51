"""srun's place in a local job: ranks as processes of this machine."""

import os
import selectors
import signal
import subprocess
import sys

from .deaths import POLL_S


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def shell_status(code):
    """A process's return code as the shell says it: 128 + the signal that ended it."""
    return code if code >= 0 else 128 - code


def ranks(count, first, command):
    """Run `count` copies of a command here, as srun would: rank in SLURM_PROCID, labelled lines, all end with one."""
    label = first != "-"
    offset = int(first) if label else 0
    processes, open_pipes, partial = [], selectors.DefaultSelector(), {}
    for rank in range(count):
        environment = dict(os.environ, SLURM_PROCID=str(rank), SLURM_NTASKS=str(count))
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
        partial[rank] = b""
        open_pipes.register(process.stdout, selectors.EVENT_READ, rank)

    def end_all(*_):
        for process in processes:
            if process.poll() is None:
                process.terminate()

    signal.signal(signal.SIGTERM, end_all)
    job_script = int(os.environ.get("JOB_SCRIPT_PID", os.getppid()))
    status, output = 0, sys.stdout.buffer
    while open_pipes.get_map():
        for key, _ in open_pipes.select(timeout=POLL_S):
            chunk = os.read(key.fd, 65536)
            rank = key.data
            if not chunk:
                open_pipes.unregister(key.fileobj)
            lines = (partial[rank] + (chunk or b"\n" * bool(partial[rank]))).split(b"\n")
            partial[rank] = lines.pop()
            prefix = b"%d: " % (rank + offset) if label else b""
            output.writelines(prefix + line + b"\n" for line in lines)
            output.flush()
        for rank, process in enumerate(processes):
            if process.poll() and not status:
                status = shell_status(process.returncode)
                output.write(b"job_agent: rank %d ended with status %d\n" % (rank + offset, status))
                output.flush()
                end_all()
        if not alive(job_script):  # nobody else will end the servers
            end_all()
    ends = [shell_status(process.wait()) for process in processes]
    return status or max(ends)
