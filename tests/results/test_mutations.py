"""A valid run, changed in one place by somebody who wants a better figure: a named check finds each change."""

import json
import re
import shutil
from pathlib import Path

import pytest
from runs import (
    DATA,
    add_error,
    make_valid_run,
    set_accuracy,
    set_both,
    set_json,
    set_score,
    set_value,
)

from disagg_lib.results import rows
from disagg_lib.results.logs import ACCURACY, DETAIL, SUMMARY, LogError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
TPOT, TTFT = "result_time_per_output_token_{}_percentile_ns", "result_first_token_{}_percentile_latency_ns"
TOKENS, DONE = "result_completed_tokens_per_second", "result_completed_samples_per_sec"
NOT_UNIQUE = "effective_performance_issue_unique"


def edit(path, old, new, count=1):
    """Replace a text that must be there."""
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, count))


def counts(m, done, drawn):
    set_value(m, "result_query_count", done)
    set_value(m, "generated_query_count", drawn)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def other(m, part, name, kind="logs_short", of="performance"):
    """A file of another run."""
    shutil.copy(DATA / kind / of / name, m / part / name)


def rehash(m):
    """accuracy.txt without its hash line."""
    path = m / "accuracy/accuracy.txt"
    path.write_text(re.sub("hash=.*", "", path.read_text()))


def without(*names):
    return lambda r: [(r / name).unlink() for name in names]


def log(change):
    """A change below mlperf/."""
    return lambda r: change(r / "mlperf")


def detail(key, value):
    return log(lambda m: set_value(m, key, value))


def both(key, value):
    return log(lambda m: set_both(m, key, value))


def score(name, value):
    return log(lambda m: set_score(m, name, value))


def accuracy(key, value):
    return log(lambda m: set_accuracy(m, key, value))


def summary(old, new):
    return log(lambda m: edit(m / "performance" / SUMMARY, old, new))


def seen(mode, **values):
    """What the client says it saw."""
    return lambda r: set_json(r / f"job/client_{mode}.json", **values)


def said(file, old, new):
    return lambda r: edit(r / file, old, new)


#: the check that must find it -> what was changed -> how
MUTATIONS = {
    "tpot_p99": {"exactly 80 ms, where only below counts": both(TPOT.format("99.00"), 80000000),
                 "81.2 ms": both(TPOT.format("99.00"), 81200000)},
    "ttft_p99": {"exactly 4500 ms": both(TTFT.format("99.00"), 4500000000)},
    "tpot_setting": {"one ns more": detail("requested_server_tpot_latency", 80000001),
                     "Server's 175 ms": detail("requested_server_tpot_latency", 175000000)},
    "ttft_setting": {"one ns more": detail("requested_server_ttft_latency", 4500000001),
                     "60 s": detail("requested_server_ttft_latency", 60000000000)},
    "early_stopping_tpot": {"LoadGen says unsuccessful": detail("early_stopping_tpot_result", '" * Run unsuccessful."')},
    "early_stopping_ttft": {"p99 one ns over leaves 84 over, 62 are allowed": both(TTFT.format("99.00"), 4500000001)},
    "early_stopping_met": {"false": log(lambda m: (set_value(m, "early_stopping_met", "false"), edit(m / "performance" / SUMMARY, "Early stopping satisfied: Yes", "Early stopping satisfied: NO")))},
    "perf_constraints_met": {"false": log(lambda m: (set_value(m, "result_perf_constraints_met", "false"), edit(m / "performance" / SUMMARY, "constraints satisfied : Yes", "constraints satisfied : NO")))},
    "min_duration_met": {"false": log(lambda m: (set_value(m, "result_min_duration_met", "false"), edit(m / "performance" / SUMMARY, "duration satisfied : Yes", "duration satisfied : NO")))},
    "min_queries_met": {"false": log(lambda m: (set_value(m, "result_min_queries_met", "false"), edit(m / "performance" / SUMMARY, "queries satisfied : Yes", "queries satisfied : NO")))},
    "loadgen_verdict": {"INVALID": log(lambda m: set_value(m, "result_validity", '"INVALID"', "Result is"))},
    "loadgen_errors": {"an error line, still VALID": log(add_error), "num_errors 3": detail("num_errors", 3),
                       "1 ERROR in the summary": summary("No errors encountered during test.", "1 ERROR encountered. See detailed log.")},
    "min_duration": {"1 ms short": both("effective_min_duration_ms", 599999), "60 s": both("effective_min_duration_ms", 60000)},
    "duration": {"8313 queries in 547 s": log(lambda m: [set_both(m, k, 15.2) for k in (DONE, "result_scheduled_samples_per_sec")])},
    "performance_sample_count": {"one short": detail("effective_performance_sample_count", 8312)},
    "equal_issue": {"off": detail("effective_sample_concatenate_permutation", "false")},
    "query_count": {"one short": log(lambda m: counts(m, 8312, 8312)), "4000": log(lambda m: counts(m, 4000, 4000)),
                    "one more than a permutation": log(lambda m: counts(m, 8314, 8314))},
    "queries_completed": {"one lost": detail("generated_query_count", 8314)},
    "seed_qsl": {"one more": detail("effective_qsl_rng_seed", 1780908523862526355)},
    "seed_sample_index": {"one more": detail("effective_sample_index_rng_seed", 14771362308971278858)},
    "seed_schedule": {"one more": detail("effective_schedule_rng_seed", 18209322760996052032)},
    "latency_percentile": {"0.9": detail("effective_target_latency_percentile", 0.9)},
    "use_token_latencies": {"off": detail("requested_use_token_latencies", "false")},
    "token_counts": {"under 2 a sample": both(TOKENS, 25.9), "over the cap of 2001": both(TOKENS, 25998),
                     "TTFT minimum 0": both("result_first_token_min_latency_ns", 0),
                     "TPOT minimum -1": both("result_time_to_output_token_min", -1)},
    "tokens_per_sample": {"tokens/s doubled in both files": both(TOKENS, 16993.6), "tokens/s 6 % up": both(TOKENS, 9006.6)},
    "latency_sum": {"tokens/s doubled": both(TOKENS, 16993.6), "latency's mean halved": both("result_mean_latency_ns", 339889428)},
    "client_tokens": {"tokens/s 1 % up": both(TOKENS, 8581.76), "output_tokens 1": seen("performance", output_tokens=1)},
    "client_samples": {"done 8000 of 8313": seen("performance", done=8000)},
    "completed_rate": {"more than was scheduled": both("result_scheduled_samples_per_sec", 12.98),
                       "samples/s doubled in both files": both(DONE, 25.98)},
    "scheduled_rate": {"target doubled": both("effective_target_qps", 26),
                       "scheduled 25/s": both("result_scheduled_samples_per_sec", 25)},
    "latency_order": {"maximum 1 ns": both("result_max_latency_ns", 1), "p99 1 ms": both("result_99.00_percentile_latency_ns", 1000000)},
    "ttft_order": {"mean above its maximum": both("result_first_token_mean_latency_ns", 138599947)},
    "tpot_order": {"p99 below p50": both(TPOT.format("99.00"), 1000)},
    "performance_issue_same": {"on": detail("effective_performance_issue_same", "true")},
    "performance_issue_unique": {"on": detail(NOT_UNIQUE, "true")},
    "max_duration": {"60 s": detail("effective_max_duration_ms", 60000)},
    "test_mode": {"FindPeakPerformance": log(lambda m: set_value(m, "effective_test_mode", '"FindPeakPerformance"', "Mode"))},
    "loadgen_scenario": {"an Offline run": log(lambda m: [other(m, "performance", n, "logs_offline") for n in (DETAIL, SUMMARY)])},
    # the files of one half contradict each other
    "mixed_runs": {"tokens/s in the detail log alone": detail(TOKENS, 16993.6), "samples/s alone": detail(DONE, 25.98),
                   "scheduled rate alone": detail("result_scheduled_samples_per_sec", 13.5), "target alone": detail("effective_target_qps", 26),
                   "another run's summary": log(lambda m: other(m, "performance", SUMMARY)),
                   "the summary's early stopping NO": summary("Early stopping satisfied: Yes", "Early stopping satisfied: NO"),
                   "the summary's INVALID": summary("Result is : VALID", "Result is : INVALID")},
    "cut_log": {"half a summary": log(lambda m: cut(m / "performance" / SUMMARY, 0.5)), "half a log": log(lambda m: cut(m / "performance" / DETAIL, 0.5))},
    "killed_run": {"the last line lost": log(lambda m: edit(m / "performance" / DETAIL, [x for x in (m / "performance" / DETAIL).read_text().splitlines(keepends=True) if "num_errors" in x][0], ""))},
    "missing_file": {"no summary": without(f"mlperf/performance/{SUMMARY}")},
    # the accuracy half
    "accuracy_rougeL": {"low": score("rougeL", 21.449933)},
    "accuracy_exact_match": {"low": score("exact_match", 89.232164), "absent": log(lambda m: edit(m / "accuracy/accuracy.txt", "'exact_match'", "'exact'")),
                             "no accuracy.txt": without("mlperf/accuracy/accuracy.txt")},
    "accuracy_tokens_per_sample": {"low": score("tokens_per_sample", 616.2), "high": score("tokens_per_sample", 753.2)},
    "accuracy_samples": {"100": score("gen_num", 100)},
    "accuracy_token_counts": {"not gen_tok_len / gen_num": score("tokens_per_sample", 654.2)},
    "accuracy_txt": {"another rougeL than was evaluated": score("rougeL", 22.5)},
    "accuracy_queries": {"100 drawn": accuracy("generated_query_count", 100)},
    "accuracy_mode": {"the performance run's logs": log(lambda m: [shutil.copy(m / "performance" / n, m / "accuracy" / n) for n in (DETAIL, SUMMARY)])},
    "accuracy_scenario": {"Offline's": accuracy("effective_scenario", '"Offline"')},
    "accuracy_dataset": {"llama2-70b's": accuracy("qsl_reported_total_count", 24576), "100 samples": accuracy("qsl_reported_total_count", 100)},
    "accuracy_seeds": {"1": accuracy("effective_qsl_rng_seed", 1)},
    "accuracy_hash": {"of another log": log(lambda m: edit(m / "accuracy" / ACCURACY, "0000", "0001")), "no hash line": log(rehash),
                      "half the log": log(lambda m: cut(m / "accuracy" / ACCURACY, 0.5)), "no accuracy json": without(f"mlperf/accuracy/{ACCURACY}")},
    "accuracy_log": {"no detail log": without(f"mlperf/accuracy/{DETAIL}"), "no logs": without(f"mlperf/accuracy/{DETAIL}", f"mlperf/accuracy/{SUMMARY}"),
                     "no summary": without(f"mlperf/accuracy/{SUMMARY}")},
    "client_failures": {"3 failed": seen("performance", failed=3, valid_client=False), "100 of a kind": seen("performance", kinds={"count_mismatch": 100})},
    "client_failures_accuracy": {"3 failed": seen("accuracy", failed=3, valid_client=False)},
    "run_files": {"no settings.json": without("job/settings.json"), "no client_performance.json": without("job/client_performance.json"),
                  "no client_accuracy.json": without("job/client_accuracy.json")},
    "test06": {"False": said("mlperf/test06/verify_accuracy.txt", "EOS check pass: True", "EOS check pass: False"),
               "not evaluated": without("mlperf/test06/verify_accuracy.txt")},
    "user_conf": {"another duration": said("user.conf", "600000", "60000"), "another target": said("user.conf", "= 13", "= 15.2"), "another target for all": said("user.conf", "*.Server.target_qps = 13", "*.*.target_qps = 15.2")},
    "data_set": {"made-up prompts": said("job/settings.json", "pickle", "synthetic")},
    # a rehearsal that would like to be measured
    "rehearsed": {"by settings.json": said("job/settings.json", '"engine": "trtllm"', '"engine": "rehearsal"'),
                  "by experiment.yaml": said("experiment.yaml", "trtllm", "rehearsal"),
                  "by the client": seen("accuracy", engine="rehearsal"), "by the manifest": said("manifest.json", "trtllm", "rehearsal")},
    "engine": {"external beside trtllm": said("job/settings.json", '"engine": "trtllm"', '"engine": "external"')},
}  # fmt: skip
CASES = [(name, what) for name, changes in MUTATIONS.items() for what in changes]


def words_of(folder, source=None):
    """Names of what failed or is not judged, or the case of the error; and whether the run would be submitted."""
    try:
        verdict = rows.verdict_of(folder, source)
    except LogError as error:
        assert str(folder) in str(error)
        return {error.case}, ""
    found = [*verdict.failed, *verdict.not_judged]
    assert all(check.advice and check.file for check in found) and all(check.name in verdict.text() for check in found)
    return {check.name for check in found} | {verdict.claim.source}, verdict.submittable


def test_the_run_as_it_was_is_submittable(tmp_path):
    found, submittable = words_of(make_valid_run(tmp_path / "run"))
    assert found == {"measured"} and submittable == "yes"


def test_there_are_enough_mutations():
    assert len(CASES) >= 75


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_change_is_found_by_the_check_of_its_name(tmp_path, name, what):
    run = make_valid_run(tmp_path / "run")
    MUTATIONS[name][what](run)
    found, submittable = words_of(run)
    assert name in found and submittable != "yes", found


def test_digests_of_the_job_find_any_change_of_loadgens_files(tmp_path):
    run = make_valid_run(tmp_path / "run")
    (run / "job/digests.json").write_text(json.dumps({"sha256": {f"mlperf/performance/{SUMMARY}": "0" * 64}}))
    assert words_of(run)[0] == {"digests", "measured"}


#: the same on a published run, asserted as measured: what the official checker passes, as others found
PUBLISHED = {
    "mixed_runs": lambda m: set_value(m, TOKENS, 28020.2),
    "tokens_per_sample": lambda m: set_both(m, TOKENS, 28020.2),
    "latency_sum": lambda m: set_both(m, TOKENS, 40000),
    "completed_rate": lambda m: set_both(m, DONE, 43.8956),
    "tpot_order": lambda m: set_both(m, TPOT.format("99.00"), 10000000),
    "ttft_order": lambda m: set_both(m, "result_first_token_mean_latency_ns", 90000000000),
    "latency_order": lambda m: set_both(m, "result_99.00_percentile_latency_ns", 1000000),
    "scheduled_rate": lambda m: set_both(m, "effective_target_qps", 44.4),
    "max_duration": lambda m: set_both(m, "effective_max_duration_ms", 60000),
    "performance_issue_same": lambda m: set_value(m, "effective_performance_issue_same", "true"),
    "accuracy_mode": lambda m: [shutil.copy(m / "performance" / n, m / "accuracy" / n) for n in (DETAIL, SUMMARY)],
    "accuracy_seeds": lambda m: set_accuracy(m, "effective_qsl_rng_seed", 1),
    "accuracy_dataset": lambda m: set_accuracy(m, "qsl_reported_total_count", 24576),
    "accuracy_hash": rehash,
    "accuracy_log": lambda m: [(m / "accuracy" / n).unlink() for n in (DETAIL, SUMMARY)],
    "accuracy_rougeL": lambda m: (m / "accuracy/accuracy.txt").unlink(),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_changed_is_found_too(tmp_path, name):
    original = SHARED / "mlperf_logs_v6.0/NVIDIA__GB200-NVL72_GB200-186GB_aarch64x72_TRT__Interactive"
    if not original.is_dir():
        pytest.skip(f"no published logs at {original}: they are not part of this repository")
    folder = tmp_path / original.name
    shutil.copytree(original / "accuracy", folder / "accuracy", copy_function=shutil.copyfile)
    shutil.copytree(original / "performance/run_1", folder / "performance", copy_function=shutil.copyfile)
    shutil.copyfile(original / "SOURCE.txt", folder / "SOURCE.txt")
    assert words_of(folder, "measured") == ({"measured"}, "yes")
    PUBLISHED[name](folder)
    found, submittable = words_of(folder, "measured")
    assert name in found and submittable != "yes", found
