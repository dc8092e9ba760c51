"""The client's part of job/settings.json."""

import json


class ClientError(Exception):
    """The run cannot start; the message says where, what was found, and what to do."""


DEFAULTS = {
    "tokenizer": None,  # tokenizer.json; accuracy and TEST06 need it if the server sends text without ids
    "max_in_flight": None,  # Offline: None means all at once
    "stall_timeout_s": 60.0,
    "keep_alive_s": 3.0,  # below the 5 s after which uvicorn (TensorRT-LLM's server) closes an idle connection
    "scenario": "Server",
    "accuracy_sample_count": 8313,
    "connections": 8,
    "request_timeout_s": 600.0,
    "test_modes": (),  # those that are still to come: a warm-up finds out whether they can have their ids
}
REQUIRED = ("endpoint", "model", "model_key", "user_conf", "total_sample_count", "data_set")


def read_settings(run_dir):
    """Return the "client" mapping of RUN/job/settings.json with defaults filled in, the engine and the servers."""
    path = run_dir / "job" / "settings.json"
    try:
        told = json.loads(path.read_text())
        given = told["client"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClientError("%s: cannot read the mapping 'client': %r" % (path, error)) from None
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise ClientError("%s: client lacks %s" % (path, ", ".join(missing)))
    return dict(DEFAULTS, engine=told.get("engine"), servers=told.get("servers", ()), **given)
