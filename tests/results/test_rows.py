"""Tables and figures of many runs, against the published table and against logs that our LoadGen wrote."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import DATA, make_run

from disagg_lib.errors import DisaggError
from disagg_lib.files import DATA as LIBRARY_DATA
from disagg_lib.results import figures, published, rows

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def test_published_logs_give_the_published_table():
    folders = sorted((SHARED / "mlperf_logs").glob("*/"))
    if not folders:
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    truth = pd.read_csv(SHARED / "published_llama3.1-405b_v5.1.csv").set_index("log_path")
    truth = truth.rename(columns={"tokens_per_s": "completed_tokens_per_s", "valid": "loadgen_valid"})
    table = rows.runs_table(folders).set_index("log_path")
    shared = [name for name in truth.columns if name in table.columns]
    assert len(shared) >= 20 and (table["error"] == "").all()
    for path, row in table.iterrows():
        for name in shared:
            assert _equal(row[name], truth.loc[path, name]), (path, name, row[name], truth.loc[path, name])
    assert table["valid"].all() and set(table["submittable"]) == {"no"} and set(table["source"]) == {"published"}


def _equal(ours, printed):
    """Equal to the digits that the CSV prints."""
    if isinstance(printed, str):
        return ours == printed
    if pd.isna(printed):
        return pd.isna(ours)
    decimals = len(repr(float(printed)).partition(".")[2])
    return round(float(ours), decimals) == float(printed)


def test_a_copy_of_the_results_repository_gives_the_published_table_too(tmp_path):
    folder = SHARED / "mlperf_logs/NVIDIA__B200-SXM-180GBx8_TRT__Interactive"
    if not folder.is_dir():
        pytest.skip(f"no published logs at {SHARED}: they are not part of this repository")
    root = tmp_path / "inference_results_v5.1/closed/NVIDIA"
    place = root / "results/B200-SXM-180GBx8_TRT/llama3.1-405b/Interactive"
    for part in ("performance", "accuracy"):
        shutil.copytree(folder / part, place / part, copy_function=shutil.copyfile)
    (root / "systems").mkdir()
    shutil.copyfile(folder / "system.json", root / "systems/B200-SXM-180GBx8_TRT.json")
    ours, theirs = rows.runs_table([place]), rows.runs_table([folder])
    pd.testing.assert_frame_equal(ours.drop(columns="folder"), theirs.drop(columns="folder"))
    assert ours["source"].tolist() == ["published"]


def test_first_column_is_the_folder_and_every_row_has_all_columns(tmp_path):
    table = rows.runs_table([make_run(tmp_path / "a"), DATA / "logs_full", tmp_path / "nothing"])
    assert table.columns[0] == "folder" and tuple(table.columns) == rows.COLUMNS
    assert table["folder"].tolist() == [
        str(tmp_path / "a"),
        str(DATA / "logs_full"),
        str(tmp_path / "nothing"),
    ]


def test_a_bad_folder_is_a_row_with_its_error_and_the_others_still_show(tmp_path):
    cut = make_run(tmp_path / "cut")
    (cut / "mlperf/performance/mlperf_log_summary.txt").write_text("")
    table = rows.runs_table([make_run(tmp_path / "good"), cut, tmp_path])
    assert table["error"].map(bool).tolist() == [False, True, True]
    assert "cut log" in table["error"][1] and not table["valid"][1]
    assert table["ttft_p99_ms"][0] > 0
    text = rows.format_table(table)
    assert "good" in text and "cut log" in text


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run = make_run(
        tmp_path_factory.mktemp("damaged") / "run",
        kind="logs_full",
        client={"valid_client": True, "failed": 0},
    )
    shutil.copytree(DATA / "logs_full/accuracy", run / "mlperf/accuracy")
    (run / "mlperf/accuracy/accuracy.txt").write_text("{'rougeL': 21.9}\n")
    return run


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_file_is_an_error_row_or_a_row_and_never_ends_the_table(whole_run, data):
    files = sorted(
        p
        for p in whole_run.rglob("*")
        if p.suffix in (".txt", ".yaml", ".json") and p.name != "mlperf_log_accuracy.json"
    )
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    at = data.draw(
        st.integers(max(0, len(before) - 12000), len(before))
    )  # the index list of 45 kB lies before
    gone = data.draw(st.integers(0, 60))
    put = data.draw(
        st.sampled_from([b"", b"null", b'"x"', b"{", b"\n", b"-", b"1e999", b"\xff", b":", b"NaN", b"\0"])
    )
    path.write_bytes(before[:at] + put + before[at + gone :])
    try:
        table = rows.runs_table([whole_run])
        rows.format_table(table)
    finally:
        path.write_bytes(before)
    assert len(table) == 1 and (table["error"][0] or table["ttft_p99_ms"][0] > 0 or not table["valid"][0])


def test_cut_accuracy_run_is_an_error_and_the_performance_figures_still_show(tmp_path):
    run = make_run(tmp_path / "run", kind="logs_full", engine="trtllm")
    shutil.copytree(DATA / "logs_full/accuracy", run / "mlperf/accuracy")
    (run / "mlperf/accuracy/mlperf_log_summary.txt").write_text("")
    table = rows.runs_table([run])
    assert "cut log" in table["error"][0] and table["ttft_p99_ms"][0] > 0
    assert not table["valid"][0] and table["first_failed"][0] == "accuracy_log"
    text = rows.format_table(table)
    assert "TTFT p99" in text and "cut log" in text


def test_accuracy_folder_without_logs_is_a_run_that_was_not_made(tmp_path):
    run = make_run(tmp_path / "run", kind="logs_full", engine="trtllm")
    (run / "mlperf/accuracy").mkdir()
    row = rows.run_row(run)
    assert row["error"] == "" and row["valid"] and row["submittable"] == "not yet"
    assert "accuracy_rougeL" in row["not_judged"]


def test_rehearsal_is_labelled_and_says_what_it_left_short(tmp_path):
    row = rows.run_row(make_run(tmp_path / "run"))
    assert (row["source"], row["scenario"], row["loadgen_valid"]) == ("rehearsed", "Interactive", "VALID")
    assert row["valid"] and row["submittable"] == "no"
    assert {"min_duration", "equal_issue", "query_count"} <= set(row["shortened"].split(", "))
    text = rows.verdict_text(tmp_path / "run")
    assert "Shortened on purpose: " in text and "because its source is rehearsed" in text


def test_same_short_run_fails_when_it_claims_to_be_measured(tmp_path):
    row = rows.run_row(make_run(tmp_path / "run", engine="trtllm"))
    assert row["source"] == "measured" and not row["valid"] and row["shortened"] == ""


def test_rehearsals_log_folder_alone_is_still_rehearsed(tmp_path):
    run = make_run(tmp_path / "run")
    assert rows.run_row(run / "mlperf/performance")["source"] == "rehearsed"


def test_failed_requests_make_a_run_invalid(tmp_path):
    run = make_run(
        tmp_path / "run",
        client={"valid_client": False, "failed": 2, "reasons": ["2 requests failed: timeout"]},
    )
    row = rows.run_row(run)
    assert row["loadgen_valid"] == "VALID" and not row["valid"] and row["first_failed"] == "client_failures"
    assert "2 requests failed: timeout" in rows.verdict_text(run)


def test_slow_run_names_its_limit_and_a_lower_load(tmp_path):
    run = make_run(tmp_path / "run", kind="logs_slow")
    text = rows.verdict_text(run)
    assert rows.run_row(run)["first_failed"] == "tpot_p99"
    assert "against 80 ms (12.66% over)" in text and "try target_qps 87.872" in text


def test_per_gpu_figure_divides_by_the_gpus_of_the_nodes(tmp_path):
    row = rows.run_row(make_run(tmp_path / "run"))
    assert row["accelerators_total"] == 8
    assert row["completed_tokens_per_s_per_gpu"] == row["completed_tokens_per_s"] / 8


def test_performance_folder_and_run_folder_give_one_row(tmp_path):
    run = make_run(tmp_path / "run")
    one, two = rows.run_row(run), rows.run_row(run / "mlperf/performance")
    assert {k: v for k, v in one.items() if k != "folder" and v == v} == {
        k: v for k, v in two.items() if k != "folder" and v == v
    }


def test_row_survives_csv_with_whole_numbers(tmp_path):
    rows.runs_table([DATA / "logs_full"]).to_csv(tmp_path / "runs.csv", index=False)
    line = (tmp_path / "runs.csv").read_text().splitlines()[1]
    assert ",8313," in line and ",600000," in line


def test_settings_that_are_no_json_are_an_error_row(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "job/settings.json").write_text('{"engine": ')
    assert "no JSON" in rows.runs_table([run])["error"][0]


# -- the published results beside ours


def test_published_table_ships_both_rounds_but_what_is_kept_aside():
    table = published.published_table()
    assert table["round"].value_counts().to_dict() == {"v5.1": 60, "v6.0": 18}
    assert set(table["source"]) == {"published"} and tuple(table.columns) == rows.COLUMNS
    racks = table[(table["accelerators_total"] == 72) & (table["scenario"] == "Interactive")]
    assert racks["target_qps"].tolist() == [15.2, 22.2, 29.3]
    row = table[
        table["log_path"].str.contains("closed/NVIDIA/results/B200-SXM-180GBx8_TRT/llama3.1-405b/Interactive")
    ].iloc[0]
    assert row["completed_tokens_per_s"] == 751.366
    assert row["completed_tokens_per_s_per_gpu"] == 751.366 / 8


def test_shipped_csvs_are_the_shared_ones_below_their_source():
    if not SHARED.is_dir():
        pytest.skip(f"no published tables at {SHARED}: they are not part of this repository")
    tables = {name: (SHARED / f"published_llama3.1-405b_{name}.csv").read_text() for name in ("v5.1", "v5.1_disaggregated", "v6.0")}
    more = tables["v5.1_disaggregated"].partition("\n")[2]
    for name, text in (("v5.1", tables["v5.1"] + more), ("v6.0", tables["v6.0"])):
        shipped = (LIBRARY_DATA / f"published_{name}.csv").read_text()
        assert shipped.endswith(text) and f"inference_results_{name}" in shipped


def test_noise_band_is_of_runs_of_one_kind_and_load():
    band = published.noise_band("completed_tokens_per_s", "Server")
    assert band.runs == 12 and 0 < band.pairs_95_percent < band.widest_percent < 1.5
    assert published.noise_band("completed_tokens_per_s", "Offline").pairs_95_percent > 1.5


def test_noise_band_says_what_it_cannot_judge():
    with pytest.raises(DisaggError, match="found 0 published eight-GPU B200 runs; needed 4"):
        published.noise_band("tpot_p99_ms", "Offline")


def differing(percent, **changes):
    base = published.published_table("Interactive").iloc[[0]].assign(folder="base", source="measured")
    other = base.assign(folder="other", **changes)
    other["completed_tokens_per_s"] = base["completed_tokens_per_s"] * (1 + percent / 100)
    table = published.compare(pd.concat([base, other]), "base").set_index("figure")
    return table.loc["completed_tokens_per_s", "word"]


def test_is_one_and_a_half_percent_real():
    assert differing(1.5) == differing(-1.5) == "beyond the noise"
    assert differing(0.2) == differing(-0.2) == "inside the noise"


def test_other_sources_and_loads_are_not_compared():
    assert differing(1.5, source="rehearsed") == "not comparable: source measured and rehearsed"
    assert differing(1.5, target_qps=2.0) == "not comparable: target_qps 1.15 and 2"


def test_published_rows_stand_below_ours_with_what_may_be_concluded(tmp_path):
    table, words = published.beside_published(rows.runs_table([make_run(tmp_path / "run")]))
    assert table["source"].tolist() == ["rehearsed"] + ["published"] * 16
    assert tuple(table.columns) == published.BESIDE and set(table["scenario"]) == {"Interactive"}
    rates = table["completed_tokens_per_s_per_gpu"][1:]
    assert rates.is_monotonic_decreasing and rates.iloc[0] == pytest.approx(255.1, abs=0.1)
    (own,) = (line for line in words.splitlines() if line.startswith("run: "))
    assert own.startswith("run: rehearsed, 549") and "tokens/s/GPU, not compared: a model's word; shortened (" in own
    assert " above " not in own and "official score" not in own, "not compared and compared in one breath"
    assert "Published in v5.1: 12 of 13 Interactive runs of llama3.1-405b (1 kept aside for checks), 25.3 to 137.8" in words
    assert "Noise: 8 of v5.1's ran on eight B200 at one load" in words and "ttft_p99_ms" in words


def test_a_valid_measured_run_stands_among_the_published_without_a_caution():
    ours = (
        published.published_table("Interactive")
        .iloc[[0]]
        .assign(source="measured", folder="ours", loadgen_scenario="Server", shortened="", error="")
    )
    words = published.beside_published(ours)[1]
    assert "ours: measured, " in words and " tokens/s/GPU, above " in words and "not compared" not in words
    assert "Closest official score: " in words and "tokens/s on 8 GPUs." in words


@pytest.mark.parametrize(
    ("gpus", "gpu", "round_", "share", "said"),
    [
        (72, "GB200", "v5.1", 0.9, "the published result on 72 GPUs (NVIDIA GB200, v5.1: 15.2 queries/s)"),
        (72, "GB200", "v6.0", 0.9, "the published result on 72 GPUs (NVIDIA GB200, v6.0: 22.2 queries/s)"),
        (72, "GB300", "v6.0", 1.1, "the published result on 72 GPUs (NVIDIA GB300, v6.0: 29.3 queries/s)"),
        (8, "B200", "v5.1", 0.5, "the best published result on 8 GPUs (Nebius NVIDIA B200-SXM-180GB, v5.1: 1.18 queries/s)"),
    ],
)  # fmt: skip
def test_a_run_is_a_share_of_the_published_result_on_as_many_gpus(gpus, gpu, round_, share, said):
    table = published.published_table("Interactive")
    same = (table["accelerators_total"] == gpus) & (table["round"] == round_) & table["accelerator"].str.contains(rf"\b{gpu}\b")
    best = table[same].nlargest(1, "completed_tokens_per_s")
    ours = best.assign(accelerator=gpu, source="measured", folder="results/ours", shortened="")
    ours["completed_tokens_per_s"] *= share
    found = published.share_of_published(next(ours.itertuples()))
    assert found == (pytest.approx(share), said)
    line = published.best_share(ours)
    assert " ".join(line.split()) == f"ours: {100 * share:.0f} % of {said}" and max(map(len, line.splitlines())) <= 80
    assert said.removeprefix("the ") in published.beside_published(ours.assign(loadgen_scenario="Server"))[1]
    assert published.share_of_published(next(ours.assign(accelerators_total=20).itertuples())) is None


@pytest.mark.parametrize("change", [{"source": "rehearsed"}, {"shortened": "60 s"}, {"valid": False}, {"source": "published"}])
def test_what_may_not_be_compared_has_no_share(change):
    ours = published.published_table("Interactive").assign(**{"source": "measured", "shortened": ""} | change)
    assert published.best_share(ours) == ""


def test_nothing_is_published_beside_a_single_stream_run():
    with pytest.raises(DisaggError, match="found SingleStream; needed a run of Interactive, Offline"):
        published.beside_published(rows.runs_table([DATA / "logs_resnet50_single_stream"]))


def test_comparison_needs_its_baseline():
    with pytest.raises(DisaggError, match="baseline nobody: found 0"):
        published.compare(published.published_table(), "nobody")


# -- figures


def test_interactivity_counts_what_it_leaves_out():
    figure = figures.figure_interactivity(published.published_table())
    assert "34 rows without TPOT or GPU count left out" in figure.get_suptitle()
    assert "tokens/s/user" in figure.axes[0].get_xlabel() and "tokens/s/GPU" in figure.axes[0].get_ylabel()


def test_distributions_show_both_limits_and_the_source(tmp_path):
    run = make_run(tmp_path / "run")
    figure = figures.figure_latency_distributions(run)
    assert "source: rehearsed" in figure.get_suptitle()
    for axis, limit in zip(figure.axes, (4500, 80), strict=True):
        assert "(ms)" in axis.get_xlabel()
        assert any(f"{limit} ms" in label for label in axis.get_legend_handles_labels()[1])
    figure.savefig(tmp_path / "figure.png")


def test_distributions_use_the_clients_rows_with_loadgens_lateness(tmp_path):
    run = make_run(tmp_path / "run")
    header = "sample_index,issue_s,late_ms,ttft_ms,latency_ms,input_tokens,output_tokens,status\n"
    rows = "".join(f"{i},{i},5.0,{100 + i},{1000 + i},10,11,ok\n" for i in range(50))
    (run / "job/queries_performance.csv").write_text(header + rows + "50,50,,,,10,0,timeout\n")
    figure = figures.figure_latency_distributions(run)
    x = figure.axes[0].lines[0].get_xdata()
    assert "per query" in figure.get_suptitle() and len(x) == 50 and min(x) == 105.0
    assert math.isclose(max(figure.axes[1].lines[0].get_xdata()), 90.0)


def test_figures_have_an_opaque_ground_for_dark_pages(tmp_path):
    figure = figures.figure_topology(make_run(tmp_path / "run"))
    assert figure.get_facecolor()[3] == 1.0 and all(axis.get_facecolor()[3] == 1.0 for axis in figure.axes)


def test_topology_shows_every_rank_once_and_its_port(tmp_path):
    figure = figures.figure_topology(make_run(tmp_path / "run"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("rank" in text for text in texts) == 8 and "C0\nrank 0, port 8336" in texts
    assert "1 context and 1 generation servers on 2 x 4 GPUs" in figure.get_suptitle()


def test_timeline_draws_phases_and_token_rate(tmp_path):
    run = make_run(tmp_path / "run")
    phases = [
        {"time_s": 100.0 + 10 * i, "phase": name}
        for i, name in enumerate(["container", "bind", "performance", "done"])
    ]
    (run / "job/phases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in phases))
    progress = [{"time_s": 110.0 + i, "mode": "performance", "issued": i, "done": i, "failed": 0, "outstanding": 3,
                 "tokens": 7 * i, "total": 10} for i in range(10)]  # fmt: skip
    (run / "job/progress.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in progress) + '{"time_s": 12'
    )
    figure = figures.figure_timeline(run)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [7.0] * 9
    assert "source: rehearsed" in figure.get_suptitle() and "(s)" in figure.axes[2].get_xlabel()


def test_the_timeline_of_a_failed_job_shows_no_node_of_its_reason(tmp_path):
    run = make_run(tmp_path / "run")
    phases = [{"time_s": 1.0, "phase": "bind"}, {"time_s": 9.0, "phase": "failed: node gpu17-rack3 is down"}]
    (run / "job/phases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in phases))
    texts = [text.get_text() for text in figures.figure_timeline(run).axes[0].texts]
    assert texts == ["bind", "failed"]


@pytest.mark.parametrize(("served", "model"), [("meta-llama/Llama-3.1-405B-Instruct", "llama3.1-405b"), ("an-8b", "")])
def test_of_an_endpoint_only_what_its_owner_states_is_told(tmp_path, served, model):
    run = make_run(tmp_path / "run", engine="external")
    path = run / "job/settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"client": settings["client"] | {"model": served}}))
    row = rows.run_row(run)
    assert math.isnan(row["accelerators_total"]) and math.isnan(row["nodes"])
    assert row["model"] == model
