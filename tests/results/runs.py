"""Runs for tests: a run folder of ours around a log of our LoadGen, a run that every check passes, and how to change one."""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

from disagg_lib.results.logs import ACCURACY, DETAIL, SUMMARY, SUMMARY_LABELS, parse_summary, read_run

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


def make_valid(folder, source="source: measured\n"):
    """A run that every check passes: 8313 queries of our LoadGen with answers made longer, and the scores of such a run."""
    for part in ("performance", "accuracy"):
        shutil.copytree(DATA / "logs_full" / part, folder / part, ignore=shutil.ignore_patterns("user.conf"))
    for key in ("qsl_reported_total_count", "generated_query_count"):  # 64 samples in the repository's small log
        set_accuracy(folder, key, 8313)
    # 45 tokens a sample become 654: 609 more of 1 ms each
    text = (folder / "performance" / DETAIL).read_text()
    for key, old in re.findall(r'"key": "(result_(?:[\d.]+_percentile|min|max|mean)_latency_ns)", "value": (\d+)', text):
        set_both(folder, key, int(old) + 609_000_000)
    set_both(folder, "result_completed_tokens_per_second", 8496.79)
    digest = hashlib.sha256((folder / "accuracy" / ACCURACY).read_bytes()).hexdigest()
    (folder / "accuracy/accuracy.txt").write_text(f"\nResults\n\n{GOOD}\n\nhash={digest}\n")
    (folder / "SOURCE.txt").write_text(source)
    return folder


TEST06 = "First token check pass: True\nEOS check pass: True\nSample length check pass: True\n"


def make_valid_run(folder):
    """The same as a run folder of ours, whole: what the client saw, settings, user.conf, TEST06, what was evaluated."""
    make_valid(folder / "mlperf")
    (folder / "mlperf/SOURCE.txt").unlink()
    for name in ("job", "tables", "mlperf/test06"):
        (folder / name).mkdir()
    (folder / "experiment.yaml").write_text("format: 1\nparameters:\n  engine: {value: trtllm, from: default}\n")
    settings = {"engine": "trtllm", "node_count": 5, "gpus_per_node": 4,
                "client": {"model_key": "llama3_1-405b-interactive", "scenario": "Server", "data_set": {"kind": "pickle"}}}  # fmt: skip
    run = read_run(folder / "mlperf/performance")
    tokens = round(run.tokens_per_sample * run.query_count)
    client = {"engine": "trtllm", "valid_client": True, "failed": 0, "kinds": {"count_mismatch": 0}, "reasons": []}
    performance = client | {"done": 8313, "issued": 8313, "output_tokens": tokens}
    scores = ast.literal_eval(GOOD) | {"notes": []}
    for name, values in {"job/settings": settings, "job/client_performance": performance, "job/client_accuracy": client,
                         "manifest": {"engine": "trtllm"}, "tables/accuracy": scores}.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "user.conf").write_text("*.Server.target_qps = 13\n*.Server.min_duration = 600000\n")
    (folder / "mlperf/test06/verify_accuracy.txt").write_text(TEST06)
    return folder




def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_both(folder, key, value):
    """A figure of the detail log, and what the summary prints of it."""
    printed = parse_summary((folder / "performance" / SUMMARY).read_text())
    labels = [label for label, of in SUMMARY_LABELS.items() if of == key and label in printed]
    set_value(folder, key, value, labels[0] if labels else None)


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
        words = r"\s+".join(map(re.escape, label.split()))
        text, count = re.subn(rf"(?mi)^(\s*{words}\s*:).*$", rf"\g<1> {value}", path.read_text())
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


