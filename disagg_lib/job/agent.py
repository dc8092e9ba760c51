"""What runs beside the servers inside the job: phases, host names, readiness, watchdog, the reason of a failure.

The job script calls it step by step, `python3 job/program agent COMMAND ...`; it needs Python 3.8 and its standard
library only. It reads job/settings.json and keeps its state in files below job/:

    phases.jsonl    one line as each phase begins: {"time_s": ..., "phase": "..."}
    nodes.txt       the job's node names, in order         addresses.txt   name host port, one server a line
    exit/NAME       exit status of a step that has ended   reason.txt      why the job failed, once known
"""

import subprocess

from .causes import finish, signal_reason
from .deaths import await_step
from .janitor import janitor
from .nodes import bind, services_up
from .phases import Failed, admit, give_reason, phase
from .ranks import ranks
from .readiness import ready
from .watchdog import adopt, collect, watch

COMMANDS = {
    "phase": phase,
    "admit": admit,
    "bind": bind,
    "await": await_step,
    "services": services_up,
    "ready": ready,
    "watch": watch,
    "collect": collect,
    "adopt": adopt,
    "janitor": janitor,
    "ranks": lambda count, first, *command: ranks(int(count), first, command),
    "reason": lambda kind, text: give_reason(signal_reason(text) if kind == "signal" else text),
    "finish": lambda status: finish(int(status)),
}


def main(arguments):
    """Run one command of COMMANDS; returns the exit status."""
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise SystemExit(f"agent: no command {command!r}")
    try:
        return COMMANDS[command](*rest) or 0
    except Failed as failure:
        print(f"failed: {failure}", flush=True)
        if command != "admit":
            give_reason(str(failure))
        return 1
    except (OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
        give_reason(f"agent {command}: {type(error).__name__}: {error}")
        raise
