"""Ready: every orchestrator or front end says 200, and completions have come back through every server."""

import http.client
import json
import re
import threading
import time

from .client_settings import ClientError
from .deaths import POLL_S, refuse_dead_servers, told
from .health import LoadingErrors, connect, dynamo_lacks, http_status
from .nodes import addresses
from .phases import RUN, Failed, settings
from .target import PROBE_IDS, PROBE_TOKENS, Target


def complete(target, timeout_s):
    """One short completion; returns None, or what was wrong with it."""
    client, ids = settings()["client"], list(PROBE_IDS)
    body = {"model": client["model"], "stream": True, "max_tokens": PROBE_TOKENS, "min_tokens": PROBE_TOKENS}
    body.update(
        {"messages": [], "prompt_token_ids": ids} if "chat" in client["endpoint"] else {"prompt": ids}
    )
    headers = {"Content-Type": "application/json"}
    if target.key:
        headers["Authorization"] = "Bearer " + target.key
    try:
        with connect(target.host, target.port, timeout_s, target.ssl) as connection:
            connection.request("POST", target.path, json.dumps(body), headers)
            answer = connection.getresponse()
            text = target.mask(answer.read().decode(errors="replace"))  # some echo the key
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    if answer.status != 200:
        return f"status {answer.status}: {text[:200]!r}"
    if '"choices"' not in text or "[DONE]" not in text:
        return f"200, but no tokens: {text[:200]!r}"
    return None


def complete_all(target, count, timeout_s):
    """`count` completions at once: an orchestrator that takes its servers in turn reaches each of them."""
    problems = ["no answer"] * count

    def one(i):
        problems[i] = complete(target, timeout_s)

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
    """name -> Target of what takes requests: the orchestrators, the front ends, or somebody else's endpoints."""
    s = settings()
    if s["servers"]:
        places = addresses()
        urls = {door["name"]: "http://%s:%d" % places[door["name"]] for door in s["doors"]}
    else:
        given = s["endpoint_url"]
        urls = {"endpoint" + str(i) * (len(given) > 1): url for i, url in enumerate(given)}
    try:
        return {name: Target(url, s["client"]["endpoint"]) for name, url in urls.items()}
    except ClientError as error:
        raise Failed(str(error)) from None


def unwell(targets):
    """What keeps completions from being tried, or None: a door or a server that does not answer /health well."""
    external = not settings()["servers"]
    for name, target in targets.items():
        status = http_status(target.host, target.port, tls=target.ssl)
        # Not every endpoint knows /health, or shows it to everybody: what a completion says counts.
        if status != 200 and not (external and status is not None and status < 500):
            said = "nothing answers" if status is None else f"status {status}"
            return f"{name} {target.host}:{target.port} /health: {said}"
    if external:
        return None
    servers = (item for item in addresses().items() if item[0] not in targets)
    deaf = [name for name, address in servers if http_status(*address) != 200]
    if deaf:
        return f"no 200 from {', '.join(deaf)}"
    asked = targets.items() if settings()["orchestrator"] == "dynamo" else ()
    return next(filter(None, (dynamo_lacks(name, door.host, door.port) for name, door in asked)), None)


def ready():
    """Ready: every door says 200, so does every server, and tokens came back through all of them."""
    s, targets = settings(), doors()
    roles = [server["role"] for server in s["servers"]]
    waves = max(1, roles.count("context"), roles.count("generation"))
    errors, well_since = LoadingErrors(), None
    deadline = time.monotonic() + s["load_timeout_s"]
    problem = "nothing answers yet"
    while time.monotonic() < deadline:
        refuse_dead_servers()
        errors.refuse()
        problem = unwell(targets)
        if problem is None:
            well_since = well_since or time.monotonic()
            for name, target in targets.items():
                remaining_s = max(1.0, min(s["stall_timeout_s"], deadline - time.monotonic()))
                problem = complete_all(target, waves, remaining_s)
                if problem is not None:
                    refuse_hopeless(name, target, problem, time.monotonic() - well_since)
                    break
            else:
                each = f" each of {len(targets)} front ends, and" if len(targets) > 1 else ""
                print(
                    f"ready: {waves} completions came back through{each} {len(roles) or 1} servers",
                    flush=True,
                )
                return
        time.sleep(1.0)
    raise Failed(f"not ready after load_timeout_s = {s['load_timeout_s']} s: {problem}")


def refuse_hopeless(name, target, problem, well_s):
    """Failed: what the completions meet will not come right by waiting, which is for servers that load."""
    s = settings()
    if not s["servers"] and re.match("status 4(?!08|25|29)", problem):
        fix = "Check endpoint_url, endpoint and served_model"
        if problem[:10] in ("status 401", "status 403"):
            fix = "Set OPENAI_API_KEY to a key that it accepts"
        raise Failed(f"{name} {target.host}:{target.port}: {problem}. {fix}")
    if s["servers"] and well_s > 2 * s["stall_timeout_s"]:
        why = told(RUN / "logs/output_workers.log", otherwise="no error in it")
        raise Failed(
            f"every server answers /health with 200, but for {well_s:.0f} s (2 x stall_timeout_s) no completion came "
            f"through: {problem}. The servers' log: {why}"
        )
