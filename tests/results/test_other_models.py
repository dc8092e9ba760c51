"""Accepted runs of other models, scenarios and rounds: none is refused, and their own formulas hold."""

import math
import shutil
from pathlib import Path

import pytest
from runs import DATA, make_valid, set_value

from disagg_lib.results import rows
from disagg_lib.results.accuracy_log import read_accuracy_txt
from disagg_lib.results.logs import read_run

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
#: folder -> valid, and what it was once refused for
ODD = {
    "accuracy_of_100_samples_v5.1": (False, "accuracy_samples"),
    "offline_24576_drawn_one_issued_v4.1": (True, "queries_completed"),
    "offline_duration_is_latency_v4.1": (None, "duration"),
    "sdxl_server_v5.1": (None, "accuracy_txt"),
    "tokens_at_the_cap_interactive_v5.1": (True, "token_counts"),
    "tokens_at_the_cap_server_v5.1": (True, "token_counts"),
    "wan_single_stream_v6.0": (None, "accuracy_txt"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_published_folder_is_judged_as_it_was_accepted(name):
    folder = SHARED / "mlperf_logs_odd" / name
    if not folder.is_dir():
        pytest.skip(f"no published logs at {folder}: they are not part of this repository")
    valid, once_refused_for = ODD[name]
    verdict, row = rows.verdict_of(folder), rows.run_row(folder)
    assert verdict.valid is valid and row["error"] == "" and row["source"] == "published"
    assert (once_refused_for in {check.name for check in verdict.failed}) == (valid is False)


def test_no_published_folder_is_refused_but_the_one_with_faults():
    folders = sorted(SHARED.glob("mlperf_logs*/*/"))
    if not folders:
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    table = rows.runs_table(folders)
    assert (table["error"] == "").all() and len(table) >= 18
    assert [Path(name).name for name in table["folder"][~table["valid"].fillna(True)]] == ["accuracy_of_100_samples_v5.1"]


def test_published_405b_asserted_as_measured_would_be_submittable():
    folders = [*sorted(SHARED.glob("mlperf_logs/*/")), *sorted(SHARED.glob("mlperf_logs_v6.0/*/"))]
    if not folders:
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    assert set(rows.runs_table(folders, "measured")["submittable"]) == {"yes"}


def test_row_of_a_model_without_whole_rules_reads_a_dash_and_a_guess_is_marked(tmp_path):
    row = rows.run_row(DATA / "logs_resnet50_multi_stream", "published")
    table = rows.as_table([row | {"valid": None}, rows.run_row(make_valid(tmp_path / "logs"))])
    cells = {line[0]: line[1:] for line in rows.table_cells(table)}
    assert cells["valid"] == ["-", "yes"] and cells["model guessed from"] == ["-", "8313 samples"]


def test_rows_of_a_published_tree_are_told_apart(tmp_path):
    place = tmp_path / "inference_results_v5.1/closed/Who/results/Box_x72/llama3.1-405b/Interactive"
    make_valid(place, source="")
    (place / "SOURCE.txt").unlink()
    heading = rows.table_cells(rows.runs_table([place]))[0]
    assert heading == ["run", "Who Box_x72 llama3.1-405b Interactive"]


# -- early-stopping estimates


@pytest.mark.parametrize(("kind", "key"), [("single", "early_stopping_latency_ss"), ("multi", "early_stopping_latency_ms")])
def test_headline_of_a_stream_scenario_is_loadgens_early_stopping_estimate(tmp_path, kind, key):
    folder = Path(shutil.copytree(DATA / f"logs_resnet50_{kind}_stream", tmp_path / "logs"))
    set_value(folder, key, 27384519)
    row = rows.run_row(folder)
    assert row["early_stopping_latency_ms"] == 27.384519
    set_value(folder, key, 0)  # too few queries for an estimate
    assert math.isnan(rows.run_row(folder)["early_stopping_latency_ms"])


# -- formulas


def test_server_counts_the_tokens_of_every_query_but_one_query_less():
    run = read_run(DATA / "logs_full/performance")
    assert run.duration_s == (8313 - 1) / run.samples_per_s
    assert run.tokens_per_sample == pytest.approx(run.completed_tokens_per_s * run.duration_s / 8313)


def test_offlines_duration_is_its_longest_latency():
    run = read_run(DATA / "logs_offline/performance")
    assert run.duration_s == run.latency_max_ms / 1e3


# -- forms of accuracy.txt


@pytest.mark.parametrize(("text", "scores"), [
    ("Accuracy Results: {'FID_SCORE': '23.6233', 'CLIP_SCORE': '31.7924'}", {"FID_SCORE": 23.6233, "CLIP_SCORE": 31.7924}),
    (" 'vbench_score': 69.98\n", {"vbench_score": 69.98}),
    ('{"exact_match": 83.67, "f1": 90.87}', {"exact_match": 83.67, "f1": 90.87}),
    ("{'rouge1': np.float64(44.4), 'gsm8k': 73.7}", {"rouge1": 44.4, "gsm8k": 73.7}),
    ("mAP=37.572%", {"mAP": 37.572}),
    ("accuracy=76.464%, good=38232, total=50000", {"accuracy": 76.464, "good": 38232, "total": 50000}),
    ("Word Error Rate: 2.07%, accuracy=97.93%", {"Rate": 2.07, "accuracy": 97.93}),
])  # fmt: skip
def test_other_models_forms_of_accuracy_txt_are_read(tmp_path, text, scores):
    (tmp_path / "accuracy.txt").write_text(f"{text}\n\nhash={'0' * 64}\n")
    assert dict(read_accuracy_txt(tmp_path / "accuracy.txt").scores) == scores


def test_unreadable_accuracy_txt_costs_the_accuracy_and_not_the_row(tmp_path):
    folder = make_valid(tmp_path / "run")
    (folder / "accuracy/accuracy.txt").write_text("Traceback: out of memory\n")
    row = rows.run_row(folder)
    assert row["ttft_p99_ms"] > 0 and "without a score" in row["error"] and row["first_failed"] == "accuracy_txt"
