"""Runs for tests: a run folder of ours around a log of our LoadGen, a run that every check passes, and how to change one."""

import json
import re
import shutil
from pathlib import Path

from disagg_lib.results.logs import DETAIL, SUMMARY

DATA = Path(__file__).parents[1] / "data"
GOOD = "{'exact_match': 90.06786234281932, 'rougeL': 21.994593737625706, 'gen_len': 23159918, 'gen_num': 8313, 'gen_tok_len': 5436366, 'tokens_per_sample': 654.0}"



def make_run(folder, kind="logs_short", engine="rehearsal", client=None):
    """A run folder of ours around a log that LoadGen wrote."""
    shutil.copytree(DATA / kind / "performance", folder / "mlperf/performance")
    (folder / "job").mkdir()
    (folder / "experiment.yaml").write_text(
        f"format: 1\nparameters:\n  engine: {{value: {engine}, from: default}}\n"
    )
    servers = [{"name": "ctx0", "role": "context", "ranks": [0, 1, 2, 3], "nodes": [0], "node": 0, "port": 8336},
               {"name": "gen0", "role": "generation", "ranks": [4, 5, 6, 7], "nodes": [1], "node": 1, "port": 8336}]  # fmt: skip
    settings = {"engine": engine, "node_count": 2, "gpus_per_node": 4, "servers": servers,
                "client": {"model_key": "llama3_1-405b-interactive", "scenario": "Server"}}  # fmt: skip
    (folder / "job/settings.json").write_text(json.dumps(settings))
    if client is not None:
        (folder / "job/client_performance.json").write_text(json.dumps(client))
    return folder


def make_valid(folder):
    """A run that every check passes: 8313 queries of our LoadGen, and the accuracy.txt of such a run."""
    for part in ("performance", "accuracy"):
        shutil.copytree(DATA / "logs_full" / part, folder / part)
    detail = folder / "accuracy" / DETAIL
    text = detail.read_text()
    for key in (
        "qsl_reported_total_count",
        "generated_query_count",
    ):  # 64 samples in the repository's small log
        text = re.sub(rf'("key": "{key}", "value": )64', r"\g<1>8313", text)
    detail.write_text(text)
    (folder / "accuracy/accuracy.txt").write_text(f"\nResults\n\n{GOOD}\n\nhash={'0' * 64}\n")
    return folder


def set_value(folder, key, value, label=None):
    """Set a detail key, and the summary's line where it prints the same, so that the files still agree."""
    path = folder / "performance" / DETAIL
    text, count = re.subn(
        rf'("key": "{re.escape(key)}", "value": )(?:"[^"]*"|[^,]+)(, "time_ms")',
        rf"\g<1>{value}\g<2>",
        path.read_text(),
    )
    assert count == 1, key
    path.write_text(text)
    if label:
        path = folder / "performance" / SUMMARY
        text, count = re.subn(rf"(?m)^({re.escape(label)}\s*:).*$", rf"\g<1> {value}", path.read_text())
        assert count >= 1, label
        path.write_text(text.replace(' "', " ").replace('"\n', "\n") if str(value).startswith('"') else text)


def set_score(folder, name, value):
    path = folder / "accuracy/accuracy.txt"
    path.write_text(re.sub(rf"'{name}': [\d.]+", f"'{name}': {value}", path.read_text()))


def set_accuracy(folder, key, value):
    path = folder / "accuracy" / DETAIL
    path.write_text(re.sub(rf'("key": "{key}", "value": )[^,]+', rf"\g<1>{value}", path.read_text(), count=1))


def add_error(folder):
    """An error line as LoadGen writes it; VALID stays VALID."""
    path = folder / "performance" / DETAIL
    line = next(line for line in path.read_text().splitlines() if '"num_errors"' in line)
    error = line.replace('"num_errors", "value": 0', '"error_runtime", "value": "sample completed twice"')
    path.write_text(
        path.read_text().replace(line, error.replace('"is_error": false', '"is_error": true') + "\n" + line)
    )


