"""Steps that ended: their status, the rank that died first, and its last lines."""

import re
import time

from .causes import moment, outside_cause
from .phases import JOB, RUN, Failed, settings

POLL_S = 0.25

# Lines that say why, among those that say what followed: enroot's, Slurm's, TensorRT-LLM's, Python's, our client's.
TELLING = re.compile(
    r"\[ERROR\]|FATAL|does not exist|couldn't|\[E\]|(?:^|\s)[\w.]*(?:Error|Exception): |request failed|refused to start"
)

LAUNCHER = re.compile(r"\s*(?:\d+: )?job_agent: |.*[Ee]xited with exit code")  # a task ended, not why
DEAD_RANK = re.compile(
    r"(?:srun: error: \S+: tasks? (\d+)|job_agent: rank (\d+))"
    r".*?(?:[Ee]xited|ended|[Kk]illed|[Tt]erminated|[Aa]borted|dumped|fault)"
)


def exit_status(name):
    """Exit status of a step, or None while it runs."""
    path = JOB / "exit" / name
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text else None


def last_lines(path, count=3):
    """The last lines of a log: what a person would look at first."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        lines = file.read().decode(errors="replace").splitlines()
    return _joined(lines[-count:]) or "(empty log)"


def told(path, mark=None, otherwise=None):
    """What a log says of a failure: the first two lines that tell why, then the last.

    mark : a rank's label, or a tuple of several: of their lines alone. otherwise : where none tells why, instead of the
    last three.
    """
    telling, last = [], []
    if path.exists():
        with path.open(errors="replace") as file:
            for line in file:
                if line.strip() and (not mark or line.lstrip().startswith(mark)):
                    last = last if last and LAUNCHER.match(line) else [*last[-2:], line]
                    if len(telling) < 2 and TELLING.search(line):
                        telling.append(line)
    if telling:
        return _joined(dict.fromkeys([*telling, last[-1]]))
    return otherwise or _joined(last) or last_lines(path)


def _joined(lines):
    return " | ".join(line.strip()[-300:] for line in lines if line.strip())


def dead_rank(log, first_rank=0):
    """The first rank that a launcher reported as ended with an error, or None."""
    if log.exists():
        with log.open(errors="replace") as file:
            for line in file:
                match = DEAD_RANK.search(line)
                if match:
                    return int(match[1]) + first_rank if match[1] else int(match[2])
    return None


def death(step, status):
    """A sentence about a step of servers that has ended."""
    s = settings()
    part = named(s["doors"] + s["services"], step)
    if part is not None:
        return f"{part_words(part)} ended with status {status}: {told(part_log(part))}"
    log = RUN / "logs/output_workers.log"
    own = named(s["servers"], step)
    rank = dead_rank(log, own["ranks"][0] if own else 0)
    server = own or server_of(rank)
    if server is None:
        return f"the servers' step ended with status {status}: {last_lines(log)}"
    rank = server["ranks"][0] if rank not in server["ranks"] else rank
    return f"{server_words(server, rank)} ended with status {status}: {told(log, mark=f'{rank}:')}"


def named(parts, name):
    """The mapping of settings.json that has this name, or None."""
    return next((part for part in parts if part["name"] == name), None)


def server_of(rank):
    return next((server for server in settings()["servers"] if rank in server["ranks"]), None)


def part_words(part):
    """'the orchestrator', or 'frontend1 (node gb02)'."""
    node = (JOB / "nodes.txt").read_text().split()[part["node"]]
    return "the orchestrator" if part["name"] == "orchestrator" else f"{part['name']} (node {node})"


def part_log(part):
    """Its own log; an orchestrator of TensorRT-LLM, and each of several, writes NVIDIA's output_server.log."""
    own = RUN / "logs" / (part["name"] + ".log")
    return own if own.exists() else RUN / "logs/output_server.log"


def server_words(server, rank):
    """'generation server gen0 (rank 16, node gb05)'."""
    place = server["ranks"].index(rank) * len(server["nodes"]) // len(server["ranks"])
    node = (JOB / "nodes.txt").read_text().split()[server["nodes"][place]]
    return f"{server['role']} server {server['name']} (rank {rank}, node {node})"


def refuse_dead_servers():
    """Servers run until teardown: one that has ended, with any status, ends the job."""
    for path in sorted((JOB / "exit").glob("*"), key=lambda p: p.stat().st_mtime):
        status = exit_status(path.name)
        if status is not None and not path.name.startswith(("client_", "container")):
            # Slurm ends the steps of a job that it takes away: then the servers' end is no cause.
            raise Failed(outside_cause(moment()[0]) or death(path.name, status))


def await_step(name):
    """Wait for a step that ends by itself, at most load_timeout_s."""
    limit_s = settings()["load_timeout_s"]
    deadline = time.monotonic() + limit_s
    while exit_status(name) is None:
        if time.monotonic() > deadline:
            log = last_lines(RUN / "logs" / (name + ".log"))
            raise Failed(f"{name}: not done after load_timeout_s = {limit_s} s: {log}")
        time.sleep(POLL_S)
    if exit_status(name):
        raise Failed(f"{name} ended with status {exit_status(name)}: {told(RUN / 'logs' / (name + '.log'))}")
