"""LoadGen's settings for a test mode, and what its log says."""

import contextlib
import json

import numpy as np

from .client_settings import ClientError

# (TTFT, TPOT) limits in ms that LoadGen 5.1 builds in for each model key, scenario Server.
LIMITS_MS = {"llama3_1-405b-interactive": (4500, 80), "llama3_1-405b": (6000, 175)}
MODES = ("performance", "accuracy", "test06")

# MLPerf's compliance test of token ids (mlcommons/inference compliance/TEST06), as LoadGen reads it.
TEST06 = """*.*.mode = 2
*.*.accuracy_log_rng_seed = 720381539243781796
*.*.accuracy_log_sampling_target = 100
*.*.min_query_count = 100
*.*.min_duration = 0
*.*.sample_concatenate_permutation = 0
"""


def configure(loadgen, run_dir, settings, mode):
    """Return LoadGen's TestSettings for this run; ClientError unless limits and token latencies are really set.

    A wrong model key or scenario makes FromConfig answer 0 and fall back to other limits without a word.
    """
    scenario, key, user_conf = settings["scenario"], settings["model_key"], run_dir / settings["user_conf"]
    if scenario not in ("Server", "Offline"):
        raise ClientError(f"settings.json: client.scenario is {scenario!r}; known are Server, Offline")
    test = loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, scenario)
    test.mode = loadgen.TestMode.AccuracyOnly if mode == "accuracy" else loadgen.TestMode.PerformanceOnly
    code = test.FromConfig(str(user_conf), key, scenario)
    if code != 0:
        raise ClientError(f"{user_conf}: LoadGen could not read it (FromConfig returned {code})")
    # A round's seeds: LoadGen reads none from user.conf, and has its own release's built in.
    if settings.get("seeds"):
        test.qsl_rng_seed, test.sample_index_rng_seed, test.schedule_rng_seed = settings["seeds"]
    if key not in LIMITS_MS:
        raise ClientError(f"settings.json: client.model_key is {key!r}; known are {', '.join(LIMITS_MS)}")
    limits_ms = test.ttft_latency / 1e6, test.tpot_latency / 1e6
    if not test.use_token_latencies or limits_ms != LIMITS_MS[key]:
        raise ClientError(
            f"LoadGen took model key {key!r}, scenario {scenario}: token latencies {test.use_token_latencies}, TTFT and "
            f"TPOT limit {limits_ms} ms; needed are True, {LIMITS_MS[key]} ms. Is this mlcommons-loadgen 5.1.2?"
        )
    return test


def scheduled_s(test, count):
    """Return LoadGen's arrival times, s after the first: it draws them from mt19937 and its schedule seed.

    Source: mlcommons/inference loadgen (std::mt19937, std::exponential_distribution); seen equal to what 5.1.2 issues.
    """
    draws = np.random.RandomState(test.schedule_rng_seed & 0xFFFFFFFF)
    words = draws.randint(0, 2**32, size=2 * count, dtype=np.uint64).astype(np.float64)
    uniform = (words[0::2] + words[1::2] * 2.0**32) / 2.0**64
    gaps = -np.log(1.0 - uniform) / test.server_target_qps
    return np.concatenate([[0.0], np.cumsum(gaps)[:-1]])


RESULT_KEYS = ("generated_query_count", "generated_samples_per_query", "loadgen_version", "result_validity")


def read_log(path):
    """Return {key: value} of RESULT_KEYS, as far as LoadGen has written them, `generated` samples, and `errors`."""
    found = {"errors": 0, "generated": None}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        found["errors"] += '"is_error": true' in line
        if any(f'"key": "{key}"' in line for key in RESULT_KEYS):
            with contextlib.suppress(ValueError):  # the last line may still be in the making
                entry = json.loads(line[line.index("{") :])
                found[entry["key"]] = entry["value"]
    if "generated_query_count" in found and "generated_samples_per_query" in found:
        found["generated"] = found["generated_query_count"] * found["generated_samples_per_query"]
    return found
