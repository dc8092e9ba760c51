"""The nodes and ports of a job: real names into config.yaml, free ports."""

import os
import re
import socket
import subprocess

from .phases import JOB, RUN, Failed, settings

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
    orchestrator = {"name": "orchestrator", "node": 0, "port": s["server_port"]}
    everything = [orchestrator] + s["servers"]
    offset = free_port_offset([x["port"] for x in everything]) if s["launcher"] == "local" else 0
    (JOB / "addresses.txt").write_text(
        "".join(f"{x['name']} {names[x['node']]} {x['port'] + offset}\n" for x in everything)
    )

    def address(match):
        return f"{names[int(match[1])]}:{int(match[2]) + offset}"

    lines = []
    # Only these three lines name nodes: a path that happens to hold NODE_1 stays as it is. Quoted, as the urls are: to YAML
    # a node that is called 1234 or on would be a number or a boolean.
    for line in (RUN / "config.yaml").read_text().splitlines():
        if line.startswith("hostname: "):
            line = f'hostname: "{names[0]}"'
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
