"""A real engine, vLLM on this machine's CPU with a random two-layer model, measured through `engine: external`."""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from client_runs import command
from processes import free_ports

from disagg_lib.cluster import launch
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.job import deaths
from disagg_lib.run.writing import create_run

BUILD = Path(__file__).parents[2] / "build"
PYTHON = BUILD / "engine/bin/python"
START_S, JOB_S = 600, 300
QUERIES, SAMPLES = 40, 16


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """(url, folder of the model) of a running engine; skips, with the reason, where there is none."""
    if not PYTHON.exists():
        why = BUILD / "engine.skipped"
        pytest.skip(
            f"no vLLM: {why.read_text().strip() if why.exists() else '`make test-engine` installs it'}"
        )
    folder, port = tmp_path_factory.mktemp("engine"), free_ports(1)[0]
    subprocess.run([PYTHON, Path(__file__).with_name("random_model.py"), folder / "model"], check=True)
    words = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder / "model",
        "--served-model-name",
        "m",
    ]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    words += ["--max-num-seqs", "16", "--enforce-eager", "--no-enable-prefix-caching"]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **quiet})
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            try:
                fetch(url + "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[
                    -3000:
                ]
                time.sleep(1)
        yield url, folder / "model"
    finally:
        server.terminate()
        server.wait(60)


def make(folder, url, **given):
    """A short run of an external endpoint: few queries with short prompts, which no parameter of a measurement makes."""
    given = {"engine": "external", "launcher": "local", "served_model": "m", "endpoint_url": url, **given}
    run = create_run(load_experiment(given=given), folder)
    (run / "user.conf").write_text(
        f"*.Server.target_qps = 4\n*.Server.min_duration = 1\n*.Server.min_query_count = {QUERIES}\n"
        "*.Server.sample_concatenate_permutation = 0\n"
    )
    settings = json.loads((run / "job/settings.json").read_text())
    settings["client"].update(accuracy_sample_count=SAMPLES, request_timeout_s=120)
    (run / "job/settings.json").write_text(json.dumps(settings))
    lengths = [f"{40 + n % 50},{8 + n % 5}\n" for n in range(settings["client"]["total_sample_count"])]
    (run / "job/lengths.csv").write_text("input_tokens,output_tokens\n" + "".join(lengths))
    return run


def tokens_of(url):
    """(prompt tokens, generated tokens) that the engine itself has counted."""
    text = fetch(url + "/metrics")
    names = ("prompt_tokens_total", "generation_tokens_total")
    return [sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE))) for name in names]


def test_a_job_measures_the_engine_and_logs_its_very_ids(tmp_path, engine):
    url, _ = engine
    run = make(tmp_path / "run", url)
    launch.submit(run)
    deadline = time.monotonic() + JOB_S
    while not (state := launch.job_state(run)).ended:
        assert time.monotonic() < deadline, deaths.last_lines(run / launch.SCRIPT_LOG, 20)
        time.sleep(0.5)
    assert (state.state, state.reason) == ("done", "")
    result = {
        mode: json.loads((run / f"job/client_{mode}.json").read_text())
        for mode in ("performance", "accuracy")
    }
    assert [(r["done"], r["failed"]) for r in result.values()] == [(QUERIES, 0), (SAMPLES, 0)]
    assert result["accuracy"]["ids"] == "return_token_ids"
    entries = json.loads((run / "mlperf/accuracy/mlperf_log_accuracy.json").read_text())
    assert len(entries) == SAMPLES
    for entry in entries:
        ids = memoryview(bytes.fromhex(entry["data"])).cast("i")
        assert len(ids) == entry["token_count"] == 8 + entry["qsl_idx"] % 5


def test_tokens_of_the_client_are_those_that_the_engine_counted(tmp_path, engine):
    url, _ = engine
    run, before = make(tmp_path / "run", url), tokens_of(url)
    subprocess.run(command(run, url), check=True, capture_output=True, timeout=JOB_S)
    rows = [line.split(",") for line in (run / "job/queries_performance.csv").read_text().splitlines()[1:]]
    sums = [sum(int(row[column]) for row in rows) for column in (5, 6)]
    assert [after - b for after, b in zip(tokens_of(url), before, strict=True)] == sums


def test_warm_up_of_the_engine_writes_what_it_did_and_measures_nothing(tmp_path, engine):
    url, _ = engine
    run = make(tmp_path / "run", url)
    subprocess.run(command(run, url, "warmup"), check=True, capture_output=True, timeout=JOB_S)
    result = json.loads((run / "job/client_warmup.json").read_text())
    assert result["ids"] == "return_token_ids" and not any(wave["failed"] for wave in result["waves"])
    assert not list((run / "mlperf").rglob("mlperf_log*"))
