"""The submission tree: whole, honest, refused where the run is not what a submission wants."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from runs import DATA, TEST06, set_accuracy, set_both, set_json, set_score, set_value
from shared_runs import REPOSITORY, make_measured, record

from disagg_lib.errors import ExportError, RunFolderError, SecretError
from disagg_lib.results.logs import ACCURACY, DETAIL, SUMMARY
from disagg_lib.results.rounds import load_rules
from disagg_lib.sharing.submission import export_submission

SEEDS = ("effective_qsl_rng_seed", "effective_sample_index_rng_seed", "effective_schedule_rng_seed")


def test_tree_of_the_open_division_is_whole(tmp_path):
    run, system = make_measured(tmp_path)
    shared = export_submission(run, tmp_path / "tree", system)
    name, bench = "GB200-NVL72_GB200-186GB_aarch64x20", "llama3.1-405b/Interactive"
    files = {
        p.relative_to(tmp_path / "tree/open/Nobody").as_posix()
        for p in (tmp_path / "tree").rglob("*")
        if p.is_file()
    }
    assert shared.missing == ()
    assert files >= {
        f"systems/{name}.json", "code/llama3.1-405b/Interactive/README.md", "code/llama3.1-405b/Interactive/job.sh",
        f"results/{name}/{bench}/performance/run_1/{SUMMARY}", f"results/{name}/{bench}/performance/run_1/{DETAIL}",
        *(f"results/{name}/{bench}/accuracy/{file}" for file in ("accuracy.txt", ACCURACY, SUMMARY, DETAIL)),
        *(f"measurements/{name}/{bench}/{file}" for file in ("user.conf", "README.md", f"{name}_Interactive.json")),
    }  # fmt: skip
    assert all(p.stat().st_size for p in (tmp_path / "tree").rglob("*") if p.is_file())
    assert "/lustre" not in (tmp_path / "tree/open/Nobody/code/llama3.1-405b/Interactive/job.sh").read_text()
    described = json.loads((tmp_path / f"tree/open/Nobody/systems/{name}.json").read_text())
    tree = load_rules()["submission"]
    assert set(described) == {*tree["system_fields"], *tree["system_fields_empty"]}


def test_accuracy_log_is_truncated_and_its_hash_is_of_the_whole(tmp_path):
    run, system = make_measured(tmp_path)
    export_submission(run, tmp_path / "tree", system)
    folder = next((tmp_path / "tree").rglob("accuracy.txt")).parent
    raw, cut = (run / "mlperf/accuracy" / ACCURACY).read_bytes(), (folder / ACCURACY).read_bytes()
    assert len(raw) > 10240 and len(cut) == 8199 and cut == raw[:4096] + b"\n\n...\n\n" + raw[-4096:]
    assert f"hash={hashlib.sha256(raw).hexdigest()}" in (folder / "accuracy.txt").read_text()


def test_loadgens_files_go_unedited(tmp_path):
    run, system = make_measured(tmp_path)
    export_submission(run, tmp_path / "tree", system)
    for name in (SUMMARY, DETAIL):
        there = next((tmp_path / "tree").rglob(f"run_1/{name}"))
        assert there.read_bytes() == (run / "mlperf/performance" / name).read_bytes()


def test_closed_division_is_told_what_is_missing(tmp_path):
    run, system = make_measured(tmp_path, "closed")
    missing = "\n".join(export_submission(run, tmp_path / "tree", system).missing)
    for part in ("TEST06", "calibration.md", "Offline"):
        assert part in missing


def with_test06(run):
    (run / "mlperf/test06").mkdir()
    (run / "mlperf/test06/verify_accuracy.txt").write_text(TEST06)
    record(run)


def test_test06_of_the_run_fills_its_slot(tmp_path):
    run, system = make_measured(tmp_path, "closed")
    with_test06(run)
    shared = export_submission(run, tmp_path / "tree", system)
    assert next((tmp_path / "tree").rglob("TEST06/verify_accuracy.txt")).read_text() == TEST06
    assert "TEST06" not in "\n".join(shared.missing)


def make_offline(folder):
    """A valid Offline run as a folder of ours: LoadGen's own Offline log, as long as the rules want it."""
    run, system = make_measured(folder, "closed")
    shutil.rmtree(run / "mlperf/performance")
    shutil.copytree(
        DATA / "logs_offline/performance",
        run / "mlperf/performance",
        ignore=shutil.ignore_patterns("user.conf"),
    )
    samples, took_s = 33252, 831.3
    edits = {"effective_min_duration_ms": 600000, "requested_min_duration_ms": 600000, "result_query_count": 1,
             "effective_samples_per_query": samples, "generated_samples_per_query": samples, "generated_query_count": 1,
             "result_samples_per_second": samples / took_s, "result_tokens_per_second": 654.0 * samples / took_s,
             "effective_performance_sample_count": 8313, "effective_sample_concatenate_permutation": "true",
             "requested_offline_expected_qps": 40, "result_validity": '"VALID"'}  # fmt: skip
    for key, value in edits.items():
        set_both(run / "mlperf", key, value)
    set_value(run / "mlperf", "result_min_duration_met", "true")
    summary = run / "mlperf/performance" / SUMMARY
    summary.write_text(summary.read_text().replace("duration satisfied : NO", "duration satisfied : Yes"))
    for name in ("min", "50.00_percentile", "90.00_percentile", "95.00_percentile", "97.00_percentile", "99.00_percentile",
                 "99.90_percentile", "max", "mean"):  # fmt: skip
        set_both(run / "mlperf", f"result_{name}_latency_ns", round(took_s * 1e9))
    set_accuracy(run / "mlperf", "effective_scenario", '"Offline"')
    set_json(run / "job/settings.json", client={"model_key": "llama3_1-405b", "scenario": "Offline"})
    set_json(run / "job/client_performance.json", done=samples, output_tokens=654 * samples)
    (run / "user.conf").write_text("*.Offline.target_qps = 40\n*.Offline.min_duration = 600000\n")
    (run / "config.yaml").write_text("of: Offline\n")
    with_test06(run)
    return run, system


def test_two_scenarios_go_into_one_closed_tree_and_keep_their_configurations(tmp_path):
    run, system = make_measured(tmp_path / "a", "closed")
    (run / "config.yaml").write_text("of: Interactive\n")
    with_test06(run)
    first = export_submission(run, tmp_path / "tree", system)
    offline, same = make_offline(tmp_path / "b")
    second = export_submission(offline, tmp_path / "tree", same)
    code = tmp_path / "tree/closed/Nobody/code/llama3.1-405b"
    assert {p.parent.name: p.read_text() for p in code.rglob("config.yaml")} == {
        "Interactive": "of: Interactive\n", "Offline": "of: Offline\n"}  # fmt: skip
    assert len(list((tmp_path / "tree").rglob("TEST06/verify_accuracy.txt"))) == 2
    assert any("/Offline: closed wants it" in item for item in first.missing)
    assert [item.split(":")[0] for item in second.missing] == ["calibration.md"]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "tree"}


def test_a_file_of_an_earlier_tree_never_changes(tmp_path):
    run, system = make_measured(tmp_path)
    export_submission(run, tmp_path / "tree", system)
    before = {p: p.read_bytes() for p in (tmp_path / "tree").rglob("*") if p.is_file()}
    export_submission(run, tmp_path / "tree", system)  # the same again is no change
    system.write_text(system.read_text().replace("cooling: x", "cooling: water"))
    with pytest.raises(ExportError, match=r"systems/GB200.*\.json: is there and would change"):
        export_submission(run, tmp_path / "tree", system)
    assert {p: p.read_bytes() for p in (tmp_path / "tree").rglob("*") if p.is_file()} == before


def test_tree_of_v6_0_has_the_layout_of_v6_0(tmp_path):
    run, system = make_measured(tmp_path, "closed")
    recorded = "format: 1\nparameters:\n  engine: {value: trtllm, from: default}\n  round: {value: v6.0, from: given}\n"
    (run / "experiment.yaml").write_text(recorded)
    for part, change in (("performance", set_value), ("accuracy", set_accuracy)):
        for key, seed in zip(SEEDS, load_rules()["rounds"]["v6.0"]["seeds"], strict=True):
            (set_both if part == "performance" else change)(run / "mlperf", key, seed)
    with_test06(run)
    export_submission(run, tmp_path / "tree", system)
    root = tmp_path / "tree/closed/Nobody"
    scenario = root / "results/GB200-NVL72_GB200-186GB_aarch64x20/llama3.1-405b/Interactive"
    assert {p.name for p in scenario.iterdir()} == {
        *("performance", "accuracy", "TEST06", "measurements.json", "user.conf", "README.md")}  # fmt: skip
    assert {p.name for p in root.iterdir()} == {"results", "src", "systems"}


def test_rehearsed_and_invalid_runs_are_refused(tmp_path):
    run, system = make_measured(tmp_path)
    set_both(run / "mlperf", "result_time_per_output_token_99.00_percentile_ns", 80000000)
    record(run)
    with pytest.raises(ExportError, match="the run is INVALID.*\n.*tpot_p99"):
        export_submission(run, tmp_path / "tree", system)
    (run / "experiment.yaml").write_text((run / "experiment.yaml").read_text().replace("trtllm", "rehearsal"))
    with pytest.raises(ExportError, match="its source is rehearsed"):
        export_submission(run, tmp_path / "tree", system)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    "file", ["experiment.yaml", "user.conf", "job/settings.json", f"mlperf/performance/{SUMMARY}"]
)
def test_files_edited_after_they_were_recorded_are_named(tmp_path, file):
    run, system = make_measured(tmp_path)
    (run / file).write_text((run / file).read_text() + "\n")
    with pytest.raises(ExportError, match=f"{file}: differs from what manifest"):
        export_submission(run, tmp_path / "tree", system)


def test_a_run_of_which_nothing_is_recorded_is_refused(tmp_path):
    run, system = make_measured(tmp_path)
    (run / "manifest.json").unlink()
    with pytest.raises(RunFolderError, match="found no digests"):
        export_submission(run, tmp_path / "tree", system)


def test_the_division_is_read_before_judging(tmp_path):
    run, system = make_measured(tmp_path)
    set_score(run / "mlperf", "rougeL", 20.0)
    set_json(run / "tables/accuracy.json", rougeL=20.0)
    record(run)
    assert export_submission(run, tmp_path / "tree", system).path.is_dir()
    system.write_text(system.read_text().replace("division: open", "division: closed"))
    with pytest.raises(ExportError, match="accuracy_rougeL: 20 against"):
        export_submission(run, tmp_path / "closed", system)


@pytest.mark.parametrize(("changes", "words"), [
    ({"number_of_nodes": 18}, "number_of_nodes: found 18; the run's job/settings.json says 5"),
    ({"measurements": {"starting_weights_filename": "mine"}}, "measurements name mine; the run was made with nvidia/"),
])  # fmt: skip
def test_a_system_that_contradicts_the_run_is_refused(tmp_path, changes, words):
    run, system = make_measured(tmp_path)
    system.write_text(yaml.safe_dump(yaml.safe_load(system.read_text()) | changes))
    with pytest.raises(ExportError, match=words):
        export_submission(run, tmp_path / "tree", system)
    assert not (tmp_path / "tree").exists()


def test_weights_that_nobody_verified_are_asked_for(tmp_path):
    run, system = make_measured(tmp_path)
    set_json(run / "manifest.json", made_with={"checkpoint": None})
    missing = "\n".join(export_submission(run, tmp_path / "tree", system).missing)
    assert (
        "starting_weights_filename, weight_data_types, weight_transformations: 01 verified no known"
        in missing
    )


def test_a_server_behind_a_network_is_no_closed_submission(tmp_path):
    run, system = make_measured(tmp_path, "closed")
    for file in (
        "experiment.yaml",
        "job/settings.json",
        "job/client_performance.json",
        "job/client_accuracy.json",
    ):
        (run / file).write_text((run / file).read_text().replace("trtllm", "external"))
    set_json(run / "job/settings.json", endpoint_url="https://llm.example.org/v1")
    record(run, engine="external")
    with pytest.raises(
        ExportError, match="llm.example.org over a network; closed wants LoadGen on the system"
    ):
        export_submission(run, tmp_path / "tree", system)


def test_name_in_loadgens_own_file_is_refused(tmp_path):
    run, system = make_measured(tmp_path)
    path = run / "mlperf/performance" / DETAIL
    path.write_text(path.read_text().replace('"value": "PySUT"', '"value": "/lustre/zproj/sut"'))
    record(run)
    with pytest.raises(SecretError, match="must go unedited"):
        export_submission(run, tmp_path / "tree", system)
    assert not (tmp_path / "tree").exists()


def test_accuracy_txt_of_another_log_is_refused(tmp_path):
    run, system = make_measured(tmp_path)
    path = run / "mlperf/accuracy/accuracy.txt"
    path.write_text(re.sub("hash=.{4}", "hash=0000", path.read_text()))
    with pytest.raises(ExportError, match="accuracy_hash: 0000"):
        export_submission(run, tmp_path / "tree", system)


def test_empty_fields_of_the_system_are_named(tmp_path):
    run, _ = make_measured(tmp_path)
    with pytest.raises(ExportError, match="empty submitter, system_name, host_memory_capacity"):
        export_submission(run, tmp_path / "tree", REPOSITORY / "params/system.example.yaml")


@pytest.mark.parametrize(
    "field",
    [
        {"division": "half"},
        {"division": "network"},
        {"submitter": "../x"},
        {"system_id": "a b"},
        {"status": "soon"},
    ],
)
def test_unusable_fields_of_the_system_are_refused(tmp_path, field):
    run, system = make_measured(tmp_path)
    system.write_text(yaml.safe_dump(yaml.safe_load(system.read_text()) | field))
    with pytest.raises(ExportError, match=f"unusable {next(iter(field))}"):
        export_submission(run, tmp_path / "tree", system)
