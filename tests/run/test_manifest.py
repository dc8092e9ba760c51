"""The manifest of a run folder: what the job was told stays as it was first recorded."""

from disagg_lib.files import REPOSITORY
from disagg_lib.run.manifest import edited_files, write_manifest
from disagg_lib.run.writing import create_run


def test_an_experiment_edited_before_the_manifest_is_written_anew_still_shows(tmp_path, experiment):
    run = create_run(experiment(REPOSITORY / "params/rehearsal.yaml"), tmp_path / "run")
    assert edited_files(run) == []
    path = run / "experiment.yaml"
    path.write_text(path.read_text().replace("value: rehearsal", "value: external", 1).replace("endpoint_url:\n    value: null", "endpoint_url:\n    value: http://127.0.0.1:1"))  # fmt: skip
    manifest = write_manifest(run)
    assert manifest["engine"] == "rehearsal" and edited_files(run) == ["experiment.yaml"]


def test_tables_and_notebooks_may_change(tmp_path, experiment):
    run = create_run(experiment(REPOSITORY / "params/rehearsal.yaml"), tmp_path / "run")
    (run / "tables/x.csv").write_text("a\n")
    write_manifest(run)
    (run / "tables/x.csv").write_text("b\n")
    assert edited_files(run) == []
