"""The crate: every file described, and met by the profiles' own validator."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from shared_runs import make_site_run, site

from disagg_lib.files import sha256
from disagg_lib.results import rows
from disagg_lib.results.logs import DETAIL
from disagg_lib.sharing.crate import export_crate


def test_crate_describes_every_file_and_the_run(tmp_path):
    folder = export_crate(make_site_run(tmp_path / "run", site()), tmp_path / "crate").path
    graph = {
        item["@id"]: item for item in json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    }
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        "ro-crate-metadata.json"
    }
    assert files == {item["@id"] for item in graph["./"]["hasPart"]}
    assert graph["config.yaml"]["sha256"] == hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
    run = graph["#run"]
    assert run["instrument"] == {"@id": "job.sh"} and run["startTime"] == "1970-01-01T00:16:40+00:00"
    assert run["actionStatus"].endswith("CompletedActionStatus")
    assert {"@id": f"mlperf/performance/{DETAIL}"} in run["result"]


def test_digests_in_a_crate_are_of_the_files_in_it(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "job/digests.json").write_text(
        json.dumps({"sha256": {"experiment.yaml": sha256(run / "experiment.yaml")}})
    )
    (run / "logs/blob").write_bytes(b"\0\1\2\xff")
    folder = export_crate(run, tmp_path / "crate").path
    named = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert len(named) > 10 and all(sha256(folder / name) == digest for name, digest in named.items())
    assert "digests" not in {check.name for check in rows.verdict_of(folder).failed}
    assert "logs/blob: no text" in (folder / "README.md").read_text()


def test_crate_of_a_failed_job_says_so(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "job/phases.jsonl").write_text('{"time_s": 1.0, "phase": "failed: gpu17-rack3 is down"}\n')
    graph = json.loads((export_crate(run, tmp_path / "crate").path / "ro-crate-metadata.json").read_text())[
        "@graph"
    ]
    action = next(item for item in graph if item["@id"] == "#run")
    assert action["actionStatus"].endswith("FailedActionStatus") and "gpu17" not in action["error"]


def serve_context(monkeypatch):
    """Give rocrate-validator the JSON-LD context from rocrate's own copy: these tests use no network.

    rocrate ships the context of 1.3; the terms that 1.1 spells otherwise are put back.
    """
    import urllib.request
    import urllib.response
    from email import message_from_string

    import requests
    import requests_cache
    import rocrate

    context = json.loads((Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text())["@context"]
    for term in ("ComputationalWorkflow", "FormalParameter"):
        context[term] = f"https://bioschemas.org/{term}"
    for term in ("input", "output"):
        context[term] = f"https://bioschemas.org/properties/{term}"
    raw = json.dumps({"@context": context}).encode()

    def answer(request, url, **_):
        if "ro/crate/1.1/context" not in url:
            raise requests.ConnectionError(f"no network in tests: {url}")
        response = requests.Response()
        response.status_code, response._content, response.url = 200, raw, url
        response.headers["Content-Type"] = "application/ld+json"
        return response

    def opened(self, request, *_, **__):
        url = request if isinstance(request, str) else request.full_url
        answer(request, url)
        return urllib.response.addinfourl(
            io.BytesIO(raw), message_from_string("Content-Type: application/ld+json\n\n"), url, 200
        )

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)
    for session in (requests.Session, requests_cache.CachedSession):
        monkeypatch.setattr(session, "send", lambda self, request, **_: answer(request, request.url))


@pytest.mark.filterwarnings("ignore")  # of the validator's own libraries
@pytest.mark.parametrize("profile", ["ro-crate-1.1", "process-run-crate-0.5", "workflow-run-crate-0.5"])
def test_crate_meets_every_requirement_of_rocrate_validator(tmp_path, monkeypatch, profile):
    services = pytest.importorskip("rocrate_validator.services", reason="roc-validator is not installed")
    models = pytest.importorskip("rocrate_validator.models")
    folder = export_crate(make_site_run(tmp_path / "run", site()), tmp_path / "crate").path
    serve_context(monkeypatch)
    asked = services.ValidationSettings(
        rocrate_uri=str(folder), profile_identifier=profile, requirement_severity=models.Severity.REQUIRED
    )
    assert [issue.message for issue in services.validate(asked).get_issues()] == []
