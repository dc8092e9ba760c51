"""What a stand-in server is told through the environment: its pace, its system, its fault."""

import re
import time
from dataclasses import dataclass

from ..errors import ServeConfigError

# What may follow each fault's name.
FAULTS = {"none": "", "crash_loading": "server", "crash_midrun": "server count", "crash_loading_quiet": "server",
          "crash_midrun_quiet": "server count", "gen_refuses": "server count", "no_request_id": "", "health_503": "",
          "no_tokens": "", "slow_tokens": "", "truncated_stream": "count", "eos_first": "count",
          "no_detokenize": ""}  # fmt: skip
LATE_FAULTS = ("crash_midrun", "crash_midrun_quiet", "gen_refuses")  # after so many requests of the server


@dataclass(frozen=True)
class Knobs:
    """What the environment asks of a rehearsal."""

    time_scale: float
    system: str
    stack: str
    fault: str
    fault_server: str
    fault_count: int

    def fault_of(self, server: str) -> str:
        """The fault that is meant for this server, "none" if it is for another."""
        return self.fault if self.fault_server == server else "none"


def read_knobs(environment) -> Knobs:
    """Read and check the REHEARSAL_* variables."""
    text = environment.get("REHEARSAL_TIME_SCALE", "1.0")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < 1e4:
        raise ServeConfigError(f"REHEARSAL_TIME_SCALE is {text!r}; a number above 0 is needed.")
    fault = environment.get("REHEARSAL_FAULT") or "none"
    match = re.fullmatch(r"(?P<name>\w+)(:(?P<server>[^:\d][^:]*))?(:(?P<count>\d+))?", fault)
    found = match.groupdict() if match else {"name": fault, "server": None, "count": None}
    name, server, count = found["name"], found["server"], found["count"]
    extra = {key for key in ("server", "count") if found[key]} - set(FAULTS.get(name, "").split())
    if not match or name not in FAULTS or extra or (FAULTS[name] == "count" and count == "0"):
        known = ", ".join(FAULTS)
        raise ServeConfigError(
            f"REHEARSAL_FAULT is {fault!r}; one of {known}, see --help for what may follow."
        )
    count = int(count or (20 if name in LATE_FAULTS else 7))
    system, stack = environment.get("REHEARSAL_SYSTEM", "gb200"), environment.get("REHEARSAL_STACK", "none")
    return Knobs(scale, system, stack, name, server or "gen0", count)


def log(name: str, text: str) -> None:
    """One line of a server's log, at once."""
    print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [REHEARSAL] [{name}] {text}", flush=True)
