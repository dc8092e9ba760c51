"""The gate: a valid log passes; each gated figure, moved by its smallest step over its limit, fails by name."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import DATA, add_error, make_valid, set_accuracy, set_score, set_value

from disagg_lib.errors import ClaimError
from disagg_lib.results import rows
from disagg_lib.results.accuracy_log import read_accuracy_txt
from disagg_lib.results.criteria import Claim
from disagg_lib.results.logs import DETAIL, SUMMARY, LogError, read_run
from disagg_lib.results.rounds import allowed_over_limit, limits_ms, load_rules, model_of
from disagg_lib.results.verdict import judge

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/mlperf_logs"
P = "percentile"
#: name of the check that must fail -> the smallest step over its limit
MUTATIONS = {
    "tpot_p99: exactly 80 ms, where only below counts": (
        "tpot_p99", lambda f: set_value(f, "result_time_per_output_token_99.00_percentile_ns", 80000000, f"99.00 {P} time to output token (ns)")),
    "ttft_p99: exactly 4500 ms": (
        "ttft_p99", lambda f: set_value(f, "result_first_token_99.00_percentile_latency_ns", 4500000000, f"99.00 {P} first token latency (ns)")),
    "tpot_setting: LoadGen judged by one ns more": ("tpot_setting", lambda f: set_value(f, "requested_server_tpot_latency", 80000001)),
    "ttft_setting": ("ttft_setting", lambda f: set_value(f, "requested_server_ttft_latency", 4500000001)),
    "early_stopping_tpot: LoadGen says unsuccessful": (
        "early_stopping_tpot", lambda f: set_value(f, "early_stopping_tpot_result", '" * Run unsuccessful."')),
    "early_stopping_ttft: p99 at the limit plus 1 ns leaves 84 over, 62 are allowed": (
        "early_stopping_ttft", lambda f: set_value(f, "result_first_token_99.00_percentile_latency_ns", 4500000001, f"99.00 {P} first token latency (ns)")),
    "early_stopping_met": ("early_stopping_met", lambda f: set_value(f, "early_stopping_met", "false")),
    "loadgen_verdict": ("loadgen_verdict", lambda f: set_value(f, "result_validity", '"INVALID"', "Result is")),
    "loadgen_errors: one line, still VALID": ("loadgen_errors", add_error),
    "loadgen_errors: num_errors 1": ("loadgen_errors", lambda f: set_value(f, "num_errors", 1)),
    "perf_constraints_met": ("perf_constraints_met", lambda f: set_value(f, "result_perf_constraints_met", "false")),
    "min_duration_met": ("min_duration_met", lambda f: set_value(f, "result_min_duration_met", "false")),
    "min_queries_met": ("min_queries_met", lambda f: set_value(f, "result_min_queries_met", "false")),
    "min_duration: 1 ms short": ("min_duration", lambda f: set_value(f, "effective_min_duration_ms", 599999)),
    "performance_sample_count: one short": (
        "performance_sample_count", lambda f: set_value(f, "effective_performance_sample_count", 8312)),
    "equal_issue": ("equal_issue", lambda f: set_value(f, "effective_sample_concatenate_permutation", "false")),
    "query_count: one short": ("query_count", lambda f: (set_value(f, "result_query_count", 8312), set_value(f, "generated_query_count", 8312))),
    "query_count: one more than a permutation": (
        "query_count", lambda f: (set_value(f, "result_query_count", 8314), set_value(f, "generated_query_count", 8314))),
    "queries_completed: one lost": ("queries_completed", lambda f: set_value(f, "generated_query_count", 8314)),
    "seed_qsl": ("seed_qsl", lambda f: set_value(f, "effective_qsl_rng_seed", 1780908523862526355)),
    "seed_sample_index": ("seed_sample_index", lambda f: set_value(f, "effective_sample_index_rng_seed", 14771362308971278858)),
    "seed_schedule": ("seed_schedule", lambda f: set_value(f, "effective_schedule_rng_seed", 18209322760996052032)),
    "latency_percentile": ("latency_percentile", lambda f: set_value(f, "effective_target_latency_percentile", 0.989)),
    "use_token_latencies": ("use_token_latencies", lambda f: set_value(f, "requested_use_token_latencies", "false")),
    "token_counts: under 2 a sample": ("token_counts", lambda f: set_value(f, "result_completed_tokens_per_second", 25.9)),
    "token_counts: over the cap of 2001": ("token_counts", lambda f: set_value(f, "result_completed_tokens_per_second", 25996)),
    "token_counts: TPOT below 0 (no token count)": (
        "token_counts", lambda f: set_value(f, "result_time_to_output_token_min", -1, "Min Time per Output Token (ns)")),
    "completed_rate: more than was scheduled": ("completed_rate", lambda f: set_value(f, "result_scheduled_samples_per_sec", 12.99)),
    "test_mode": ("test_mode", lambda f: set_value(f, "effective_test_mode", '"FindPeakPerformance"', "Mode")),
    "accuracy_rougeL": ("accuracy_rougeL", lambda f: set_score(f, "rougeL", 21.449933)),
    "accuracy_exact_match": ("accuracy_exact_match", lambda f: set_score(f, "exact_match", 89.232164)),
    "accuracy_tokens_per_sample: low": ("accuracy_tokens_per_sample", lambda f: set_score(f, "tokens_per_sample", 616.2)),
    "accuracy_tokens_per_sample: high": ("accuracy_tokens_per_sample", lambda f: set_score(f, "tokens_per_sample", 753.2)),
    "accuracy_samples": ("accuracy_samples", lambda f: set_score(f, "gen_num", 8312)),
    "accuracy_token_counts": ("accuracy_token_counts", lambda f: set_score(f, "tokens_per_sample", 654.2)),
    "accuracy_queries": ("accuracy_queries", lambda f: set_accuracy(f, "generated_query_count", 8312)),
}  # fmt: skip


def test_unchanged_run_passes_every_check_and_is_submittable(tmp_path):
    verdict = rows.verdict_of(make_valid(tmp_path / "run"))
    assert [check for check in verdict.checks if check.status != "pass"] == []
    assert verdict.valid and verdict.submittable and verdict.loadgen_valid == "VALID"
    assert len(verdict.checks) >= 25


@pytest.mark.parametrize("what", MUTATIONS)
def test_smallest_step_over_a_limit_fails_the_check_of_that_name(tmp_path, what):
    name, mutate = MUTATIONS[what]
    folder = make_valid(tmp_path / "run__Interactive")
    mutate(folder)
    verdict = rows.verdict_of(folder)
    failed = {check.name: check for check in verdict.failed}
    assert name in failed and not verdict.valid and not verdict.submittable
    assert failed[name].advice and name in verdict.text()


@pytest.mark.parametrize(
    ("key", "value", "label"),
    [
        (
            "result_time_per_output_token_99.00_percentile_ns",
            79999999,
            f"99.00 {P} time to output token (ns)",
        ),
        ("result_first_token_99.00_percentile_latency_ns", 4499999999, f"99.00 {P} first token latency (ns)"),
    ],
)
def test_one_ns_below_a_limit_passes(tmp_path, key, value, label):
    folder = make_valid(tmp_path / "run")
    set_value(folder, key, value, label)
    assert rows.verdict_of(folder).valid


def test_at_least_fifteen_checks_are_mutated():
    assert len({name for name, _ in MUTATIONS.values()}) >= 15


@pytest.mark.parametrize(("rest", "valid"), [(313, True), (312, False)])
def test_accuracy_run_that_draws_the_data_set_in_parts_is_counted_whole(tmp_path, rest, valid):
    folder = make_valid(tmp_path / "run")
    set_accuracy(folder, "generated_query_count", 8000)
    path = folder / "accuracy" / DETAIL
    drawn = [line for line in path.read_text().splitlines(keepends=True) if '"generated_' in line]
    again = "".join(drawn).replace('"value": 8000', f'"value": {rest}')
    path.write_text(path.read_text().replace(drawn[-1], drawn[-1] + again))
    assert [check.name for check in rows.verdict_of(folder).failed] == ["accuracy_queries"] * (not valid)


@pytest.mark.parametrize(("name", "low"), [("rougeL", 21.449934), ("exact_match", 89.232165)])
def test_score_on_its_bound_passes(tmp_path, name, low):
    folder = make_valid(tmp_path / "run")
    set_score(folder, name, low)
    assert rows.verdict_of(folder).valid


# -- what is claimed decides


def test_interactive_is_judged_by_its_own_limits_and_not_by_servers():
    run = read_run(DATA / "logs_slow/performance")  # TPOT 90 ms: over 80, under 175
    as_interactive = judge(run, Claim("llama3.1-405b", "Interactive", source="rehearsed"))
    as_server = judge(run, Claim("llama3.1-405b", "Server", source="rehearsed"))
    assert "tpot_p99" in {check.name for check in as_interactive.failed}
    assert "tpot_p99" not in {check.name for check in as_server.failed}


@pytest.mark.parametrize(("name", "scenario"), [("X__Interactive", "Interactive"), ("X__Server", "Server")])
def test_folder_name_claims_the_scenario(tmp_path, name, scenario):
    assert rows.verdict_of(make_valid(tmp_path / name)).claim.scenario == scenario


def test_server_claim_of_a_log_with_interactive_limits_is_judged_by_servers(tmp_path):
    folder = make_valid(tmp_path / "X__Server")
    set_value(
        folder,
        "result_time_per_output_token_99.00_percentile_ns",
        80000000,
        f"99.00 {P} time to output token (ns)",
    )
    assert "tpot_p99" not in {check.name for check in rows.verdict_of(folder).failed}


def test_v5_0_has_no_interactive_and_other_seeds(tmp_path):
    run = read_run(DATA / "logs_full/performance")
    failed = {check.name for check in judge(run, Claim("llama3.1-405b", "Interactive", round="v5.0")).failed}
    assert {"scenario_in_round", "seed_qsl", "seed_sample_index", "seed_schedule"} == failed


def test_seed_of_another_round_is_named():
    run = replace(
        read_run(DATA / "logs_full/performance"), seeds=tuple(load_rules()["rounds"]["v6.0"]["seeds"])
    )
    check = judge(run, Claim("llama3.1-405b", "Interactive")).failed[0]
    assert check.name == "seed_qsl" and "a seed of v6.0" in check.advice


def test_unknown_round_is_refused_with_those_that_are_known():
    with pytest.raises(ClaimError, match=r"v9\.9.*v5\.0, v5\.1, v6\.0"):
        judge(read_run(DATA / "logs_full/performance"), Claim("llama3.1-405b", "Interactive", round="v9.9"))


def test_model_without_rules_is_not_judged_and_never_submittable():
    run = read_run(DATA / "logs_full/performance")
    published = judge(run, Claim("", "Server", source="published"))
    assert "model_rules" in {check.name for check in published.not_judged} and published.valid
    measured = judge(run, Claim("", "Server"))
    assert "model_rules" in {check.name for check in measured.failed} and not measured.submittable


def test_run_without_accuracy_is_submittable_by_what_was_judged():
    verdict = judge(read_run(DATA / "logs_full/performance"), Claim("llama3.1-405b", "Interactive"))
    assert verdict.valid and verdict.submittable
    assert "Not judged: accuracy_rougeL" in verdict.text() and "the rest is still missing" in verdict.text()


def test_accuracy_run_is_no_performance_run():
    verdict = judge(read_run(DATA / "logs_full/accuracy"), Claim("llama3.1-405b", "Interactive"))
    assert "test_mode" in {check.name for check in verdict.failed}


@pytest.mark.parametrize("source", ["rehearsed", "simulated", "published"])
def test_only_measured_runs_are_submittable(tmp_path, source):
    verdict = rows.verdict_of(make_valid(tmp_path / "run"), source)
    assert verdict.valid and not verdict.submittable


def test_rehearsal_is_not_judged_on_accuracy_and_shortens_on_purpose(tmp_path):
    scores = read_accuracy_txt(make_valid(tmp_path / "run") / "accuracy/accuracy.txt")
    scores = replace(scores, scores={**scores.scores, "rougeL": 1.0})
    verdict = judge(
        read_run(DATA / "logs_short/performance"),
        Claim("llama3.1-405b", "Interactive", source="rehearsed"),
        scores,
    )
    assert {c.name for c in verdict.shortened} == {"min_duration", "duration", "query_count", "equal_issue"}
    assert "accuracy_rougeL" in {c.name for c in verdict.not_judged} and verdict.valid


def test_open_division_waives_accuracy_bounds_alone(tmp_path):
    folder = make_valid(tmp_path / "run")
    set_score(folder, "rougeL", 10.0)
    run, scores = read_run(folder / "performance"), read_accuracy_txt(folder / "accuracy/accuracy.txt")
    assert not judge(run, Claim("llama3.1-405b", "Interactive"), scores).valid
    assert judge(run, Claim("llama3.1-405b", "Interactive", division="open"), scores).valid


def test_every_published_run_is_valid_by_every_check():
    folders = sorted(SHARED.glob("*/"))
    if not folders:
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    for folder in folders:
        verdict = rows.verdict_of(folder)
        assert verdict.valid and not verdict.not_judged, verdict.text()


def test_published_interactive_run_fails_with_tpot_of_exactly_80_ms(tmp_path):
    original = SHARED / "NVIDIA__B200-SXM-180GBx8_TRT__Interactive"
    if not original.is_dir():
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    folder = Path(shutil.copytree(original, tmp_path / original.name, copy_function=shutil.copyfile))
    shutil.move(folder / "performance/run_1", tmp_path / "run_1")
    (folder / "performance").rmdir()
    shutil.move(tmp_path / "run_1", folder / "performance")
    set_value(
        folder,
        "result_time_per_output_token_99.00_percentile_ns",
        80000000,
        f"99.00 {P} time to output token (ns)",
    )
    assert [check.name for check in rows.verdict_of(folder).failed][0] == "tpot_p99"


# -- early stopping


@pytest.mark.parametrize(
    ("queries", "allowed"), [(458, -1), (459, 0), (8313, 62), (16626, 136), (24939, 213), (33252, 290), (99756, 924)]
)  # fmt: skip
def test_allowance_is_the_exact_binomial_one(queries, allowed):
    assert allowed_over_limit(queries) == allowed


@given(st.integers(1, 3000))
def test_allowance_agrees_with_summing_the_binomial_in_whole_numbers(queries):
    total, t = 0, -1  # P[X <= t] <= 0.01 with p = 1/100: both sides times 100^queries
    for k in range(queries + 1):
        total += math.comb(queries, k) * 99 ** (queries - k)
        if total * 100 > 100**queries:
            break
        t = k
    assert allowed_over_limit(queries) == t


def test_percentiles_that_prove_too_many_over_the_limit_beat_loadgens_word(tmp_path):
    run = replace(
        read_run(DATA / "logs_full/performance"),
        tpot_p97_ms=81.0,
        tpot_p99_ms=82.0,
        tpot_p999_ms=83.0,
        tpot_max_ms=90.0,
    )
    check = next(
        c for c in judge(run, Claim("llama3.1-405b", "Interactive")).checks if c.name == "early_stopping_tpot"
    )
    assert (check.status, check.figure, check.limit) == ("fail", 8313 - int(8313 * 0.97), 62)


def test_between_p99_and_p999_loadgens_own_count_decides():
    run = replace(read_run(DATA / "logs_full/performance"), tpot_p999_ms=89.9, tpot_max_ms=119.0)
    for word, status in (
        (" * Run successful.", "pass"),
        (" * Run unsuccessful.", "fail"),
        ("", "not judged"),
    ):
        verdict = judge(replace(run, early_stopping_tpot=word), Claim("llama3.1-405b", "Interactive"))
        assert next(c.status for c in verdict.checks if c.name == "early_stopping_tpot") == status


# -- rules


def test_rules_of_every_round_are_whole():
    rules = load_rules()
    assert set(rules["rounds"]) >= {"v5.0", "v5.1", "v6.0"}
    assert all(len(set(round_["seeds"])) == 3 for round_ in rules["rounds"].values())
    assert limits_ms("llama3.1-405b", "Interactive") == (4500, 80) and limits_ms(
        "llama3.1-405b", "Server"
    ) == (6000, 175)
    assert limits_ms("llama3.1-405b", "Offline") is None


@pytest.mark.parametrize(
    "name", ["llama3.1-405b", "llama3_1-405b", "llama3_1-405b-interactive", "Llama3.1-405B"]
)
def test_every_name_of_the_model_is_known(name):
    assert model_of(name) == "llama3.1-405b"


def test_suggested_load_follows_the_worst_margin():
    run = replace(
        read_run(DATA / "logs_full/performance"), tpot_p99_ms=100.0, ttft_p99_ms=4600.0, target_qps=4.0
    )
    assert "try target_qps 3.168 (now 4)" in judge(run, Claim("llama3.1-405b", "Interactive")).suggestion


def test_a_mixed_run_is_an_error_and_no_verdict(tmp_path):
    folder = make_valid(tmp_path / "run")
    shutil.copy(DATA / "logs_short/performance" / SUMMARY, folder / "performance" / SUMMARY)
    with pytest.raises(LogError):
        rows.verdict_of(folder)
