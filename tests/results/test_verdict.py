"""The gate: a valid log passes; each gated figure, moved by its smallest step over its limit, fails by name."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import DATA, make_valid, make_valid_run, set_accuracy, set_both, set_json, set_score, set_value

from disagg_lib.errors import ClaimError
from disagg_lib.results import rows
from disagg_lib.results.accuracy_criteria import AccuracyHalf
from disagg_lib.results.accuracy_log import read_accuracy_txt
from disagg_lib.results.criteria import Claim
from disagg_lib.results.logs import DETAIL, SUMMARY, LogError, read_run
from disagg_lib.results.rounds import allowed_over_limit, limits_ms, load_rules, model_of
from disagg_lib.results.verdict import judge

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/mlperf_logs"
P = "percentile"


def test_unchanged_run_passes_every_check_and_is_submittable(tmp_path):
    verdict = rows.verdict_of(make_valid(tmp_path / "run"))
    assert [check for check in verdict.checks if check.status != "pass"] == []
    assert verdict.valid and verdict.submittable == "yes" and verdict.loadgen_valid == "VALID"
    assert len(verdict.checks) >= 40


@pytest.mark.parametrize(
    ("key", "longest", "value"),
    [
        ("result_time_per_output_token_{}_percentile_ns", "result_time_to_output_token_max", 79999999),
        ("result_first_token_{}_percentile_latency_ns", "result_first_token_max_latency_ns", 4499999999),
    ],
)
def test_one_ns_below_a_limit_passes(tmp_path, key, longest, value):
    folder = make_valid(tmp_path / "run")
    for name in (key.format("99.00"), key.format("99.90"), longest):
        set_both(folder, name, value)
    assert rows.verdict_of(folder).valid


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
    assert "model_rules" in {check.name for check in published.not_judged} and published.valid is None
    measured = judge(run, Claim("", "Server", source="measured"))
    assert "model_rules" in {check.name for check in measured.failed} and measured.submittable == "no"


def test_run_without_accuracy_is_not_submittable_yet():
    claim = Claim("llama3.1-405b", "Interactive", source="measured")
    verdict = judge(read_run(DATA / "logs_full/performance"), claim)
    assert verdict.valid and verdict.submittable == "not yet"
    assert "Not judged: accuracy_rougeL" in verdict.text()
    assert "Submittable: not yet: Make the accuracy run and evaluate it." in verdict.text()


def test_logs_of_which_nobody_says_whence_are_never_submittable(tmp_path):
    folder = make_valid(tmp_path / "run", source="")
    row = rows.run_row(folder)
    assert (row["source"], row["valid"], row["submittable"]) == ("unstated", True, "no")
    asserted = rows.run_row(folder, "measured")
    assert (asserted["submittable"], asserted["source_from"]) == ("yes", "asserted with --source")
    assert "measured (asserted with --source)" in rows.verdict_text(folder, "measured")


@pytest.mark.parametrize(("line", "source"), [("repository: none", "unstated"), ("source: published", "unstated"), ("source: simulated", "simulated"), ("repository: x/inference_results_v6.0", "published")])  # fmt: skip
def test_published_is_only_what_names_a_results_repository(tmp_path, line, source):
    assert rows.run_row(make_valid(tmp_path / "run", line))["source"] == source


def test_nobody_asserts_that_a_rehearsal_was_measured(tmp_path):
    run = make_valid_run(tmp_path / "run")
    set_json(run / "job/client_performance.json", engine="rehearsal")
    with pytest.raises(ClaimError, match=r"found source rehearsed \(job/client_performance\.json\)"):
        rows.run_row(run, "measured")


def test_round_and_division_can_be_claimed(tmp_path):
    folder = make_valid(tmp_path / "run")
    set_score(folder, "rougeL", 10.0)
    assert rows.verdict_of(folder, division="open").valid and not rows.verdict_of(folder).valid
    assert "seed_qsl" in {check.name for check in rows.verdict_of(folder, round="v6.0").failed}


def test_accuracy_run_is_no_performance_run():
    verdict = judge(read_run(DATA / "logs_full/accuracy"), Claim("llama3.1-405b", "Interactive"))
    assert "test_mode" in {check.name for check in verdict.failed}


@pytest.mark.parametrize("source", ["rehearsed", "simulated", "published", "unstated"])
def test_only_measured_runs_are_submittable(tmp_path, source):
    verdict = rows.verdict_of(make_valid(tmp_path / "run"), source)
    assert verdict.valid and verdict.submittable == "no"


def test_rehearsal_is_not_judged_on_accuracy_and_shortens_on_purpose(tmp_path):
    scores = read_accuracy_txt(make_valid(tmp_path / "run") / "accuracy/accuracy.txt")
    scores = replace(scores, scores={**scores.scores, "rougeL": 1.0})
    verdict = judge(
        read_run(DATA / "logs_short/performance"),
        Claim("llama3.1-405b", "Interactive", source="rehearsed"),
        AccuracyHalf(scores=scores),
    )
    assert {c.name for c in verdict.shortened} == {
        *("min_duration", "duration", "query_count", "equal_issue", "tokens_per_sample")
    }
    assert "accuracy_rougeL" in {c.name for c in verdict.not_judged} and verdict.valid


def test_open_division_waives_accuracy_bounds_alone(tmp_path):
    folder = make_valid(tmp_path / "run")
    set_score(folder, "rougeL", 10.0)
    run, half = (
        read_run(folder / "performance"),
        AccuracyHalf(scores=read_accuracy_txt(folder / "accuracy/accuracy.txt")),
    )
    assert not judge(run, Claim("llama3.1-405b", "Interactive"), half).valid
    assert judge(run, Claim("llama3.1-405b", "Interactive", division="open"), half).valid


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
