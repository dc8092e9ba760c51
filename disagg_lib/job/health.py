"""Servers that die while their step lives on, as TensorRT-LLM's launchers let them.

Its launchers start the server beside themselves and read no exit status: a failed one leaves the step, and so the job,
waiting. What tells is /health, and while loading the server's log.
"""

import contextlib
import http.client
import json
import re
import ssl
import threading
import time

from .causes import moment, outside_cause
from .deaths import (
    POLL_S,
    last_lines,
    named,
    part_log,
    part_words,
    refuse_dead_servers,
    server_of,
    server_words,
    told,
)
from .nodes import addresses
from .phases import RUN, Failed, settings

HEALTH_S = 10.0  # between two questions while a client runs, and how long an answer may take
EXIT_S = 3.0  # in which Slurm ends the other ranks of a step whose first one died
MISSES = 2  # in a row, of a server that was well: it is dead

ERROR = re.compile(rb"Traceback \(most recent call last\)|\[E\]|Executor worker returned error|RuntimeError")


def connect(host, port, timeout_s, tls=None):
    """A connection that closes with its `with`; tls: an ssl context, of an external endpoint."""
    if tls:
        return contextlib.closing(http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls))
    return contextlib.closing(http.client.HTTPConnection(host, port, timeout=timeout_s))


def get(host, port, path, read, timeout_s=5.0, tls=None):
    """What `read` makes of the answer, or None when none comes; Failed if TLS does not come about."""
    with connect(host, port, timeout_s, tls) as connection:
        try:
            connection.request("GET", path)
            return read(connection.getresponse())
        except ssl.SSLError as error:
            fix = (
                "Needed: a certificate that this machine trusts; SSL_CERT_FILE names a file of those to trust"
            )
            raise Failed(f"endpoint_url: no TLS with {host}:{port}: {error}. {fix}") from None
        except (OSError, http.client.HTTPException, ValueError):  # of a name that is none; of what is no JSON
            return None


def http_status(host, port, **how):
    """Status of /health, or None when nothing answers."""
    return get(host, port, "/health", lambda answer: answer.status, **how)


def dynamo_lacks(name, host, port):
    """What a front end of Dynamo does not know yet, or None: it must list the model, and find every server."""
    model, servers = settings()["client"]["model"], len(settings()["servers"])
    models = get(host, port, "/v1/models", json.load) or {}
    listed = [entry.get("id") for entry in models.get("data") or ()]
    if model not in listed:
        return f"{name} {host}:{port} does not list the model {model}, but {listed}"
    health = get(host, port, "/health", json.load) or {}
    instances = health.get("instances") or ()
    found = len({i.get("instance_id") for i in instances if i.get("endpoint") == "generate"})
    return f"{name} {host}:{port} has found {found} of {servers} servers" if found < servers else None


class LoadingErrors:
    """The servers' log as it grows: ranks that wrote an error, and when they wrote last."""

    def __init__(self):
        self.place = 0  # byte of the log
        self.silent_since = {}  # rank -> time of its last line since its error

    def read(self):
        path = RUN / "logs/output_workers.log"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.place)
            whole = file.read().rpartition(b"\n")[0]
        self.place += len(whole) + bool(whole)
        for line in whole.split(b"\n"):
            rank = re.match(rb"\s*(\d+):", line)
            if rank and (int(rank[1]) in self.silent_since or ERROR.search(line)):
                self.silent_since[int(rank[1])] = time.monotonic()

    def refuse(self):
        """Failed: a rank wrote an error, nothing since, and its server does not answer."""
        self.read()
        limit_s = settings()["error_grace_s"]
        for rank, since in self.silent_since.items():
            server = server_of(rank)
            if server is None or time.monotonic() - since < limit_s:
                continue
            if http_status(*addresses()[server["name"]]) != 200:
                words = told(RUN / "logs/output_workers.log", mark=f"{rank}:")
                raise Failed(
                    f"{server_words(server, rank)} wrote an error, then nothing for {limit_s} s, and does not "
                    f"answer /health: {words}"
                )


class Pulse:
    """Every server's /health, asked from threads of their own while a client runs."""

    def __init__(self):
        self.dead = []
        for name, address in addresses().items():
            threading.Thread(target=self._ask, args=(name, *address), daemon=True).start()

    def _ask(self, name, host, port):
        misses = 0
        while misses < MISSES:
            misses = 0 if http_status(host, port, timeout_s=HEALTH_S) == 200 else misses + 1
            time.sleep(HEALTH_S if misses < MISSES else 0)
        self.dead.append(name)

    def refuse(self):
        """Failed: a server that was well has not answered `MISSES` times."""
        if self.dead:
            refuse(self.dead[0])


def refuse_silent():
    """Failed: a server does not answer just now, which explains why the client failed."""
    for name, address in addresses().items():
        if http_status(*address) != 200:
            refuse(name)


def refuse(name):
    """Failed: this server is silent; or its step, or its neighbours', is just ending, which tells more."""
    deadline = time.monotonic() + EXIT_S
    while time.monotonic() < deadline:
        refuse_dead_servers()
        time.sleep(POLL_S)
    raise Failed(outside_cause(moment()[0]) or silence(name))


def silence(name):
    """A sentence about a server that was well and is silent."""
    server = named(settings()["servers"], name)
    if server is None:
        part = named(settings()["doors"], name)
        who, words = part_words(part), last_lines(part_log(part))
    else:
        who = server_words(server, server["ranks"][0])
        words = told(RUN / "logs/output_workers.log", mark=tuple(f"{rank}:" for rank in server["ranks"]))
    return f"{who} was well and does not answer /health any more; its step lives on: {words}"
