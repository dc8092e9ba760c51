"""The submission tree: whole, honest, refused where the run is not what a submission wants."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from runs import DATA
from shared_runs import REPOSITORY, make_measured

from disagg_lib.errors import ExportError, SecretError
from disagg_lib.results.logs import ACCURACY, DETAIL, SUMMARY
from disagg_lib.results.rounds import load_rules
from disagg_lib.sharing.submission import export_submission


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
        f"systems/{name}.json", "code/llama3.1-405b/README.md", "code/llama3.1-405b/job.sh",
        f"results/{name}/{bench}/performance/run_1/{SUMMARY}", f"results/{name}/{bench}/performance/run_1/{DETAIL}",
        *(f"results/{name}/{bench}/accuracy/{file}" for file in ("accuracy.txt", ACCURACY, SUMMARY, DETAIL)),
        *(f"measurements/{name}/{bench}/{file}" for file in ("user.conf", "README.md", f"{name}_Interactive.json")),
    }  # fmt: skip
    assert all(p.stat().st_size for p in (tmp_path / "tree").rglob("*") if p.is_file())
    assert "/lustre" not in (tmp_path / "tree/open/Nobody/code/llama3.1-405b/job.sh").read_text()
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


def test_test06_of_the_run_fills_its_slot(tmp_path):
    run, system = make_measured(tmp_path, "closed")
    (run / "mlperf/test06").mkdir()
    words = "First token check pass: True\nEOS check pass: True\nSample length check pass: True\n"
    (run / "mlperf/test06/verify_accuracy.txt").write_text(words)
    shared = export_submission(run, tmp_path / "tree", system)
    assert next((tmp_path / "tree").rglob("TEST06/verify_accuracy.txt")).read_text() == words
    assert "TEST06" not in "\n".join(shared.missing)


@pytest.mark.parametrize("engine", ["rehearsal", "trtllm"])
def test_rehearsed_and_invalid_runs_are_refused(tmp_path, engine):
    run, system = make_measured(tmp_path)
    shutil.rmtree(run / "mlperf/performance")
    shutil.copytree(DATA / "logs_slow/performance", run / "mlperf/performance")
    if engine == "rehearsal":
        (run / "experiment.yaml").write_text(
            (run / "experiment.yaml").read_text().replace("trtllm", "rehearsal")
        )
    with pytest.raises(ExportError, match="its source is rehearsed" if engine == "rehearsal" else "tpot_p99"):
        export_submission(run, tmp_path / "tree", system)
    assert not (tmp_path / "tree").exists()


def test_name_in_loadgens_own_file_is_refused(tmp_path):
    run, system = make_measured(tmp_path)
    path = run / "mlperf/performance" / DETAIL
    path.write_text(path.read_text().replace('"value": "PySUT"', '"value": "/lustre/zproj/sut"'))
    with pytest.raises(SecretError, match="must go unedited"):
        export_submission(run, tmp_path / "tree", system)
    assert not (tmp_path / "tree").exists()


def test_accuracy_txt_of_another_log_is_refused(tmp_path):
    run, system = make_measured(tmp_path)
    path = run / "mlperf/accuracy/accuracy.txt"
    path.write_text(re.sub("hash=.{4}", "hash=0000", path.read_text()))
    with pytest.raises(ExportError, match="needed the scores of this log"):
        export_submission(run, tmp_path / "tree", system)


def test_empty_fields_of_the_system_are_named(tmp_path):
    run, _ = make_measured(tmp_path)
    with pytest.raises(ExportError, match="empty submitter, system_name, host_memory_capacity"):
        export_submission(run, tmp_path / "tree", REPOSITORY / "params/system.example.yaml")


@pytest.mark.parametrize(
    "field", [{"division": "half"}, {"submitter": "../x"}, {"system_id": "a b"}, {"status": "soon"}]
)
def test_unusable_fields_of_the_system_are_refused(tmp_path, field):
    run, system = make_measured(tmp_path)
    system.write_text(yaml.safe_dump(yaml.safe_load(system.read_text()) | field))
    with pytest.raises(ExportError, match=f"unusable {next(iter(field))}"):
        export_submission(run, tmp_path / "tree", system)
