"""The nodes and ports of a job: real names into config.yaml, free ports."""

import os
import re
import socket
import subprocess
import time

from .deaths import refuse_dead_servers
from .phases import JOB, RUN, Failed, settings

SERVICES_S = 60
PORT_STEP, PORT_TRIES = 50, 400  # a local job moves all its ports by a multiple of this


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
    everything = s["doors"] + s["servers"] + s["services"]
    offset = free_port_offset([x["port"] for x in everything]) if s["launcher"] == "local" else 0
    (JOB / "addresses.txt").write_text(
        "".join(f"{x['name']} {names[x['node']]} {x['port'] + offset}\n" for x in everything)
    )

    def address(match):
        return f"{names[int(match[1])]}:{int(match[2]) + offset}"

    text = (RUN / "config.yaml").read_text()
    for number, door in enumerate(s["doors"] if s["orchestrator"] == "trtllm" else s["doors"][:1]):
        lines = []
        # Only these three lines name nodes: a path that happens to hold NODE_1 stays as it is. Quoted, as the urls are: to
        # YAML a node that is called 1234 or on would be a number or a boolean.
        for line in text.splitlines():
            if line.startswith("hostname: "):
                line = f'hostname: "{names[door["node"]]}"'
            elif line.startswith("port: "):
                line = f"port: {door['port'] + offset}"
            elif line.startswith("  urls: "):
                line = re.sub(r"NODE_(\d+):(\d+)", address, line)
            lines.append(line)
        # Ids of requests hold their orchestrator's number.
        lines += [f"node_id: {number + 1}"] if len(s["doors"]) > 1 else []
        path = JOB / (f"config.bound.{number}.yaml" if number else "config.bound.yaml")
        path.write_text("\n".join(lines) + "\n")
    print(f"nodes: {' '.join(names)}", flush=True)


def places():
    """name -> (host, port) of all that listens: addresses.txt."""
    rows = (line.split() for line in (JOB / "addresses.txt").read_text().splitlines())
    return {name: (host, int(port)) for name, host, port in rows}


def addresses():
    """name -> (host, port) of what answers /health: every orchestrator or front end, and every server."""
    silent = [service["name"] for service in settings()["services"]]
    return {name: place for name, place in places().items() if name not in silent}


def services_up():
    """Wait until all services take connections: what needs them ends at once where they do not."""
    listening = places()
    waiting = [(service["name"], *listening[service["name"]]) for service in settings()["services"]]
    deadline = time.monotonic() + SERVICES_S
    while waiting:
        refuse_dead_servers()
        name, host, port = waiting[0]
        try:
            socket.create_connection((host, port), timeout=5).close()
            waiting.pop(0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failed(f"{name} {host}:{port} does not answer after {SERVICES_S} s: {error}") from None
            time.sleep(0.2)
