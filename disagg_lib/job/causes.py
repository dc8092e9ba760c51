"""What runs beside the servers inside the job: phases, host names, readiness, watchdog, the reason of a failure.

The job script calls it step by step; it is copied into the run folder and needs Python 3.8 and its standard
library only. It reads job/settings.json and keeps its state in files below job/:

    phases.jsonl    one line as each phase begins: {"time_s": ..., "phase": "..."}
    nodes.txt       the job's node names, in order         addresses.txt   name host port, one server a line
    exit/NAME       exit status of a step that has ended   reason.txt      why the job failed, once known
"""

import http.client
import json
import os
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

JOB = Path(__file__).resolve().parent
RUN = JOB.parent
POLL_S = 0.25
REASON_ROOM = 4096  # bytes
HARNESS_QUIET_S = 1200  # NVIDIA's harness loads its data set and retries for minutes before its first query
PORT_STEP, PORT_TRIES = 50, 400  # a local job moves all its ports by a multiple of this


class Failed(Exception):
    """The job cannot go on; the message is the reason."""


def settings():
    return json.loads((JOB / "settings.json").read_text())


# -- phases and the reason of a failure


def phases():
    path = JOB / "phases.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def phase(name):
    line = json.dumps({"time_s": round(time.time(), 3), "phase": name})
    with (JOB / "phases.jsonl").open("a") as file:
        file.write(line + "\n")
    print(f"phase {name}", flush=True)


def admit():
    """Refuse a folder that was used before; a job that Slurm started again says so in its phases."""
    seen = phases()
    if not seen:
        try:
            (JOB / "phases.jsonl").open("x").close()
        except FileExistsError:
            raise Failed("refused: another job has just taken this run folder. Make a new run") from None
        # Room for the reason and the last word, should the disk be full by then.
        for name, size in (("reason.txt", REASON_ROOM), ("reserve", 65536)):
            (JOB / name).write_bytes(b" " * size)
        return
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    reason = f"refused: this run folder was used before (phase {seen[-1]['phase']}; restart {restarts}). Make a new run"
    if not ended(seen) and restarts != "0":
        phase("failed: " + reason)
    raise Failed(reason)


def ended(seen):
    return bool(seen) and (seen[-1]["phase"] == "done" or seen[-1]["phase"].startswith("failed"))


def reason():
    path = JOB / "reason.txt"
    return path.read_text().strip() if path.exists() else ""


def give_reason(text):
    """Keep the first reason: later ones are its consequences."""
    if not reason():
        with (JOB / "reason.txt").open("r+") as file:
            file.write(text[:REASON_ROOM] + "\n")


def slurm_says(*command):
    """Words of a Slurm command, or none: in an ending job it has little time to answer."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True, timeout=3)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def outside_cause(when):
    """What Slurm did to the job, if anything: a node failed, it was requeued, preempted or cancelled."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    words = slurm_says("scontrol", "--oneliner", "show", "job", job)
    state = next((word[9:] for word in words if word.startswith("JobState=")), "")
    nodes = "--nodes=" + os.environ.get("SLURM_JOB_NODELIST", "")
    down = slurm_says("sinfo", "--noheader", "--Node", nodes, "--states=down", "--format=%N")
    if state == "NODE_FAIL" or down:
        return (
            f"node failure {when}: {', '.join(sorted(set(down))) or 'node unknown'} is down. Submit a new run"
        )
    restarts = next((word[9:] for word in words if word.startswith("Restarts=")), "0")
    if state in ("PENDING", "REQUEUED") or restarts != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return f"requeued {when}. Jobs are not restarted in a used folder: make a new run"
    if state == "PREEMPTED":
        return f"preempted {when} by a job of higher priority"
    return f"cancelled {when}" if state == "CANCELLED" else None


def moment():
    """('during <phase>, after <n> s', seconds since the first phase)."""
    seen = phases()
    elapsed_s = time.time() - seen[0]["time_s"] if seen else 0.0
    names = [line["phase"] for line in seen if line["phase"] != "teardown"]
    return f"during {names[-1] if names else 'start'}, after {elapsed_s:.0f} s", elapsed_s


def signal_reason(name):
    """Why a signal came: what Slurm did, the time limit, or somebody's scancel."""
    when, elapsed_s = moment()
    limit_s = settings()["time_limit_s"]
    cause = outside_cause(when)
    if (
        cause is None
        and "SLURM_JOB_ID" in os.environ
        and elapsed_s > limit_s - 180
        and not (JOB / "cancelled").exists()
    ):
        return f"time limit {when}: time_limit is {limit_s} s, and teardown begins 120 s before. Raise time_limit"
    return cause or f"cancelled (signal {name}) {when}"


def finish(status):
    """The last line of phases.jsonl, and the job's exit status."""
    if (JOB / "reserve").exists():
        (JOB / "reserve").unlink()
    if status in (129, 130, 143):  # a signal reached our own process before the script's trap
        give_reason(signal_reason("TERM"))
    text = reason() or (
        outside_cause(moment()[0]) or f"the job script ended with status {status}" if status else ""
    )
    phase("failed: " + text if text else "done")
    return status or int(bool(text))


# -- the nodes of the job


def node_names(count):
    """The job's nodes in Slurm's own words; in a local job every node is this machine."""
    if settings()["launcher"] == "local":
        return ["127.0.0.1"] * count
    done = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        stdout=subprocess.PIPE,
        universal_newlines=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def free_port_offset(ports):
    """An offset at which every port is free on the loopback address.

    Each job begins to look elsewhere: two that start together would otherwise both see the same free ports.
    """
    start = os.getppid() % PORT_TRIES
    for number in range(PORT_TRIES):
        offset = PORT_STEP * ((start + number) % PORT_TRIES)
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port + offset))
        except (OSError, OverflowError):
            continue
        return offset
    raise Failed(
        f"no {len(ports)} free ports near {ports[0]} and {ports[-1]}. End what listens there, or set server_port, worker_port"
    )


def bind():
    """Put the real node names (and, in a local job, free ports) where config.yaml has placeholders."""
    s = settings()
    names = node_names(s["node_count"])
    if len(names) < s["node_count"]:
        raise Failed(f"bind: the job has {len(names)} nodes ({', '.join(names)}), needed {s['node_count']}")
    (JOB / "nodes.txt").write_text("".join(name + "\n" for name in names))
    if not s["servers"]:
        return
    orchestrator = {"name": "orchestrator", "node": 0, "port": s["server_port"]}
    everything = [orchestrator] + s["servers"]
    offset = free_port_offset([x["port"] for x in everything]) if s["launcher"] == "local" else 0
    (JOB / "addresses.txt").write_text(
        "".join(f"{x['name']} {names[x['node']]} {x['port'] + offset}\n" for x in everything)
    )

    def address(match):
        return f"{names[int(match[1])]}:{int(match[2]) + offset}"

    lines = []
    # Only these three lines name nodes: a path that happens to hold NODE_1 stays as it is.
    for line in (RUN / "config.yaml").read_text().splitlines():
        if line.startswith("hostname: "):
            line = f"hostname: {names[0]}"
        elif line.startswith("port: "):
            line = f"port: {s['server_port'] + offset}"
        elif line.startswith("  urls: "):
            line = re.sub(r"NODE_(\d+):(\d+)", address, line)
        lines.append(line)
    (JOB / "config.bound.yaml").write_text("\n".join(lines) + "\n")
    print(f"nodes: {' '.join(names)}", flush=True)


def addresses():
    """name -> (host, port) of the orchestrator and every server."""
    rows = (line.split() for line in (JOB / "addresses.txt").read_text().splitlines())
    return {name: (host, int(port)) for name, host, port in rows}


# -- deaths


def exit_status(name):
    """Exit status of a step, or None while it runs."""
    path = JOB / "exit" / name
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text else None


def last_lines(path, count=3, mark=None):
    """The last lines of a log, or of one rank in it: what a person would look at first."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        lines = file.read().decode(errors="replace").splitlines()
    if mark is not None:
        lines = [line for line in lines if line.lstrip().startswith(mark)] or lines
    return " | ".join(line.strip()[-300:] for line in lines[-count:] if line.strip()) or "(empty log)"


def dead_rank(log, first_rank=0):
    """The first rank that a launcher reported as ended with an error, or None."""
    pattern = re.compile(
        r"(?:srun: error: \S+: tasks? (\d+)|job_agent: rank (\d+)).*?(?:[Ee]xited|ended|[Kk]illed|[Tt]erminated|[Aa]borted|dumped|fault)"
    )
    if log.exists():
        with log.open(errors="replace") as file:
            for line in file:
                match = pattern.search(line)
                if match:
                    return int(match[1]) + first_rank if match[1] else int(match[2])
    return None


def death(step, status):
    """A sentence about a step of servers that has ended."""
    if step == "orchestrator":
        return f"the orchestrator ended with status {status}: {last_lines(RUN / 'logs/output_server.log')}"
    log = RUN / "logs/output_workers.log"
    servers = settings()["servers"]
    own = next((s for s in servers if s["name"] == step), None)
    rank = dead_rank(log, own["ranks"][0] if own else 0)
    server = own or next((s for s in servers if rank in s["ranks"]), None)
    if server is None:
        return f"the servers' step ended with status {status}: {last_lines(log)}"
    rank = server["ranks"][0] if rank not in server["ranks"] else rank
    node = (
        (JOB / "nodes.txt")
        .read_text()
        .split()[server["nodes"][server["ranks"].index(rank) * len(server["nodes"]) // len(server["ranks"])]]
    )
    return (
        f"{server['role']} server {server['name']} (rank {rank}, node {node}) ended with status {status}: "
        f"{last_lines(log, mark=f'{rank}:')}"
    )


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
        raise Failed(
            f"{name} ended with status {exit_status(name)}: {last_lines(RUN / 'logs' / (name + '.log'))}"
        )


# -- readiness


def connect(host, port, timeout_s):
    secure = (settings()["endpoint_url"] or "").startswith("https:")
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    return kind(host, port, timeout=timeout_s)


def prefix():
    """What stands before /v1 in an external endpoint's path; base URLs are given with and without /v1."""
    path = urllib.parse.urlsplit(settings()["endpoint_url"] or "").path.rstrip("/")
    return path[:-3] if path.endswith("/v1") else path


def http_status(host, port, path="/health", timeout_s=5.0):
    """Status of a GET, or None when nothing answers; Failed if TLS does not come about."""
    connection = connect(host, port, timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except ssl.SSLError as error:
        fix = "Needed: a certificate that this machine trusts; SSL_CERT_FILE names a file of those to trust"
        raise Failed(f"endpoint_url: no TLS with {host}:{port}: {error}. {fix}") from None
    except (OSError, http.client.HTTPException, ValueError):  # of a name that is none
        return None
    finally:
        connection.close()


def complete(host, port, timeout_s):
    """One short completion; returns None, or what was wrong with it."""
    client, ids = settings()["client"], list(range(1000, 1032))
    body = {"model": client["model"], "max_tokens": 4, "min_tokens": 4, "stream": True}
    body.update(
        {"messages": [], "prompt_token_ids": ids} if "chat" in client["endpoint"] else {"prompt": ids}
    )
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY")  # as the client does: external endpoints
    if key and not (key.isascii() and key.isprintable()):
        return "OPENAI_API_KEY holds what no HTTP header may, a line end, say"
    if key:
        headers["Authorization"] = "Bearer " + key
    connection = connect(host, port, timeout_s)
    try:
        connection.request("POST", prefix() + client["endpoint"], json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        text = re.sub(r"\\*".join(map(re.escape, key)), "***", text) if key else text  # some echo it
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    if answer.status != 200:
        return f"status {answer.status}: {text[:200]!r}"
    if '"choices"' not in text or "[DONE]" not in text:
        return f"200, but no tokens: {text[:200]!r}"
    return None


def complete_all(host, port, count, timeout_s):
    """`count` completions at once: an orchestrator that takes its servers in turn reaches each of them."""
    problems = ["no answer"] * count

    def one(i):
        problems[i] = complete(host, port, timeout_s)

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    while any(thread.is_alive() for thread in threads):
        refuse_dead_servers()
        if time.monotonic() > deadline:  # a server that drips keeps every single read short of its time-out
            return f"no complete answer within {timeout_s:.0f} s"
        time.sleep(POLL_S)
    return next((p for p in problems if p), None)


def ready():
    """Ready: the orchestrator says 200, so does every server, and tokens came back through all of them."""
    s = settings()
    external = not s["servers"]
    if external:
        url = urllib.parse.urlsplit(s["endpoint_url"])
        port = url.port or (443 if url.scheme == "https" else 80)
        targets, waves = {"endpoint": (url.hostname, port)}, 1
    else:
        targets = addresses()
        waves = max(sum(x["role"] == role for x in s["servers"]) for role in ("context", "generation"))
    gate = next(iter(targets))
    host, port = targets[gate]
    deadline = time.monotonic() + s["load_timeout_s"]
    problem = "nothing answers yet"
    while time.monotonic() < deadline:
        refuse_dead_servers()
        status = http_status(host, port)
        # Not every endpoint knows /health, or shows it to everybody: what a completion says counts.
        if status == 200 or external and status is not None and status < 500:
            deaf = [] if external else [name for name, (h, p) in targets.items() if http_status(h, p) != 200]
            remaining_s = max(1.0, min(s["stall_timeout_s"], deadline - time.monotonic()))
            problem = (
                f"no 200 from {', '.join(deaf)}" if deaf else complete_all(host, port, waves, remaining_s)
            )
            if problem is None:
                print(f"ready: {waves} completions came back through {len(targets)} servers", flush=True)
                return
            # The next completion would be refused, too.
            if external and re.match(r"OPENAI_API_KEY|status 4(?!08|25|29)", problem):
                fix = "Check endpoint_url, endpoint and served_model"
                if problem[:10] in ("status 401", "status 403", "OPENAI_API"):
                    fix = "Set OPENAI_API_KEY to a key that it accepts"
                raise Failed(f"{gate} {host}:{port}: {problem}. {fix}")
        else:
            problem = f"{gate} {host}:{port} /health: " + (
                "nothing answers" if status is None else f"status {status}"
            )
        time.sleep(1.0)
    raise Failed(f"not ready after load_timeout_s = {s['load_timeout_s']} s: {problem}")


# -- the watchdog


def last_progress():
    """The newest complete line of progress.jsonl, or None."""
    path = JOB / "progress.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None


def harness_progress(mode):
    """NVIDIA's harness reports nothing while it runs: that the servers' iteration log grows stands for tokens."""
    log = RUN / "logs/output_workers.log"
    size = log.stat().st_size if log.exists() else 0
    return {"mode": mode, "done": 0, "tokens": size, "outstanding": 1}


def collect(mode):
    """Copy the harness's LoadGen files, unedited, to where ours would be."""
    found = sorted((JOB / ("harness_" + mode)).rglob("mlperf_log_detail.txt"))
    if len(found) != 1:
        raise Failed(
            f"{len(found)} LoadGen logs below job/harness_{mode}, needed 1: see logs/mlperf_benchmark_{mode}.log"
        )
    target = RUN / "mlperf" / mode
    target.mkdir(parents=True)
    for path in sorted(found[0].parent.glob("mlperf_log_*")) + sorted(found[0].parent.glob("accuracy.txt")):
        shutil.copy2(path, target)


def adopt():
    """Put the target QPS that the search found where LoadGen reads it."""
    found = json.loads((JOB / "find_target_qps.json").read_text())["target_qps"]
    path = RUN / "user.conf"
    path.write_text(re.sub(r"(target_qps = ).*", lambda match: f"{match[1]}{found}", path.read_text()))
    print(f"target_qps found: {found}", flush=True)


def watch(mode):
    """Follow the client of one test mode to its end; a stall or a dead server ends the job."""
    s = settings()
    ours = s["client"]["kind"] == "loadgen"
    stall_s = s["stall_timeout_s"] if ours else max(s["stall_timeout_s"], HARNESS_QUIET_S)
    moved, seen = time.monotonic(), None
    while True:
        status = exit_status("client_" + mode)
        if status is not None:
            if status:
                log = RUN / "logs" / (mode + ".log")
                log = log if log.exists() else RUN / "logs" / f"mlperf_benchmark_{mode}.log"
                raise Failed(f"the {mode} client ended with status {status}: {last_lines(log)}")
            return
        refuse_dead_servers()
        progress = last_progress() if ours else harness_progress(mode)
        if progress is not None and progress["mode"] == mode:
            # With no query open there are no tokens to wait for, but a living client still writes a line a second.
            counts = (
                progress["done"],
                progress["tokens"],
                0 if progress["outstanding"] else progress["time_s"],
            )
            if counts != seen:
                moved, seen = time.monotonic(), counts
        still_s = time.monotonic() - moved
        # Before the first query a client prepares its requests, in a search before each trial.
        prepares = not seen or mode == "find_target_qps" and not (progress and progress["outstanding"])
        if still_s > (max(stall_s, 600) if prepares else stall_s):
            what = f"{progress['outstanding']} queries open" if seen else "the client has not begun"
            done = f"{progress['done']} done, {progress['tokens']} tokens" if seen else "no query"
            raise Failed(
                f"stalled: no token for {still_s:.0f} s (stall_timeout_s = {stall_s}) with {what}; {done} so far"
            )
        time.sleep(POLL_S)


# -- srun's place in a local job


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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
                status = process.returncode if process.returncode > 0 else 128 - process.returncode
                output.write(b"job_agent: rank %d ended with status %d\n" % (rank + offset, status))
                output.flush()
                end_all()
        if not alive(job_script):  # nobody else will end the servers
            end_all()
    return status or max(abs(process.wait()) for process in processes)


def main(arguments):
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "phase":
            phase(rest[0])
        elif command == "admit":
            admit()
        elif command == "bind":
            bind()
        elif command == "await":
            await_step(rest[0])
        elif command == "ready":
            ready()
        elif command == "watch":
            watch(rest[0])
        elif command == "collect":
            collect(rest[0])
        elif command == "adopt":
            adopt()
        elif command == "ranks":
            return ranks(int(rest[0]), rest[1], rest[2:])
        elif command == "reason":
            give_reason(signal_reason(rest[1]) if rest[0] == "signal" else rest[1])
        elif command == "finish":
            return finish(int(rest[0]))
        else:
            raise SystemExit(f"job_agent.py: no command {command!r}")
    except Failed as failure:
        print(f"failed: {failure}", flush=True)
        if command != "admit":
            give_reason(str(failure))
        return 1
    except (OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
        give_reason(f"job_agent.py {command}: {type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
