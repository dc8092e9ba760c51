"""Ready: the orchestrator says 200, and completions have come back through every server."""

import http.client
import json
import os
import re
import threading
import time
import urllib.parse

from .deaths import POLL_S, refuse_dead_servers, told
from .health import LoadingErrors, connect, dynamo_lacks, http_status, prefix
from .nodes import addresses
from .phases import RUN, Failed, settings


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


def doors():
    """name -> (host, port) of what takes requests: the orchestrator, the front ends, or somebody else's."""
    if settings()["servers"]:
        return {door["name"]: addresses()[door["name"]] for door in settings()["doors"]}
    urls = [urllib.parse.urlsplit(url) for url in settings()["endpoint_url"]]
    ports = [url.port or (443 if url.scheme == "https" else 80) for url in urls]
    names = ["endpoint"] if len(urls) == 1 else [f"endpoint{i}" for i in range(len(urls))]
    return {name: (url.hostname, port) for name, url, port in zip(names, urls, ports)}


def unwell():
    """What keeps completions from being tried, or None: a door or a server that does not answer /health well."""
    external = not settings()["servers"]
    for name, (host, port) in doors().items():
        status = http_status(host, port)
        # Not every endpoint knows /health, or shows it to everybody: what a completion says counts.
        if status != 200 and not (external and status is not None and status < 500):
            said = "nothing answers" if status is None else f"status {status}"
            return f"{name} {host}:{port} /health: {said}"
    deaf = [] if external else [name for name, (h, p) in addresses().items() if http_status(h, p) != 200]
    if deaf:
        return f"no 200 from {', '.join(deaf)}"
    asked = doors().items() if settings()["orchestrator"] == "dynamo" and not external else ()
    return next(filter(None, (dynamo_lacks(name, *address) for name, address in asked)), None)


def ready():
    """Ready: every door says 200, so does every server, and tokens came back through all of them."""
    s = settings()
    roles = [server["role"] for server in s["servers"]]
    waves = max(1, roles.count("context"), roles.count("generation"))
    errors, well_since = LoadingErrors(), None
    deadline = time.monotonic() + s["load_timeout_s"]
    problem = "nothing answers yet"
    while time.monotonic() < deadline:
        refuse_dead_servers()
        errors.refuse()
        problem = unwell()
        if problem is None:
            well_since = well_since or time.monotonic()
            for name, (host, port) in doors().items():
                remaining_s = max(1.0, min(s["stall_timeout_s"], deadline - time.monotonic()))
                problem = complete_all(host, port, waves, remaining_s)
                if problem is not None:
                    refuse_hopeless(name, host, port, problem, time.monotonic() - well_since)
                    break
            else:
                each = f" each of {len(doors())} front ends, and" if len(doors()) > 1 else ""
                print(
                    f"ready: {waves} completions came back through{each} {len(roles) or 1} servers",
                    flush=True,
                )
                return
        time.sleep(1.0)
    raise Failed(f"not ready after load_timeout_s = {s['load_timeout_s']} s: {problem}")


def refuse_hopeless(gate, host, port, problem, well_s):
    """Failed: what the completions meet will not come right by waiting, which is for servers that load."""
    s = settings()
    if not s["servers"] and re.match(r"OPENAI_API_KEY|status 4(?!08|25|29)", problem):
        fix = "Check endpoint_url, endpoint and served_model"
        if problem[:10] in ("status 401", "status 403", "OPENAI_API"):
            fix = "Set OPENAI_API_KEY to a key that it accepts"
        raise Failed(f"{gate} {host}:{port}: {problem}. {fix}")
    if s["servers"] and well_s > 2 * s["stall_timeout_s"]:
        why = told(RUN / "logs/output_workers.log", otherwise="no error in it")
        raise Failed(
            f"every server answers /health with 200, but for {well_s:.0f} s (2 x stall_timeout_s) no completion came "
            f"through: {problem}. The servers' log: {why}"
        )
