"""What leaves the site: pages, crate, submission tree. Nothing of the site's names may be in any of them."""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rows import make_run
from test_verdict import make_valid

from disagg_lib.errors import ExportError, SecretError
from disagg_lib.results import found, outputs, rows
from disagg_lib.results.logs import ACCURACY, DETAIL, SUMMARY
from disagg_lib.results.rounds import load_rules
from disagg_lib.run.tables import repeat_command
from disagg_lib.sharing import example, pages
from disagg_lib.sharing.crate import export_crate
from disagg_lib.sharing.pages import export_html
from disagg_lib.sharing.recompute import recompute
from disagg_lib.sharing.submission import export_submission

DATA = Path(__file__).parents[1] / "data"
REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = {"cells": [{"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "source": "print(run_dir)",
            "outputs": [{"name": "stdout", "output_type": "stream", "text": "OUTPUT"}]}],
            "metadata": {"papermill": {"input_path": "PATH"}}, "nbformat": 4, "nbformat_minor": 5}  # fmt: skip


def site(
    token="hf_Q7abcdefghijklmnopq1234",
    user="zoe_site",
    host="gpu17-rack3",
    path="/lustre/zproj/models",
    account="acc_zeta",
):
    return {"token": token, "user": user, "host": host, "path": path, "account": account}


def make_site_run(folder, site):
    """A run folder in whose every corner a name of the site stands, as job, server and shell would write it."""
    run = make_run(folder)
    token, user, host, path, account = (site[key] for key in ("token", "user", "host", "path", "account"))
    parameters = {"engine": "rehearsal", "account": account, "work_dir": path, "container_mounts": f"{path}:/work,{path}/data:/data",
                  "test_modes": ["performance"], "round": None}  # fmt: skip
    recorded = {
        name: {"value": value, "from": "given" if name in ("account", "work_dir") else "params/site.yaml"}
        for name, value in parameters.items()
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump({"format": 1, "parameters": recorded}))
    (run / "config.yaml").write_text(
        f"hostname: {host}\nmodel: {path}/ckpt\ncontext_servers:\n  urls:\n  - {host}:8336\n"
    )
    (run / "job.sh").write_text(
        f"#!/bin/bash\n#SBATCH --account={account}\nexport HF_TOKEN={token}\ncd /home/{user}/runs\nsrun --nodelist={host} true\n"
    )
    (run / "user.conf").write_text("*.Server.target_qps = 3.85\n")
    (run / "job/nodes.txt").write_text(f"{host}\n{host}.cluster.example\n")
    (run / "job/addresses.txt").write_text(f"orchestrator {host} 8000\n")
    (run / "job/phases.jsonl").write_text(
        '{"time_s": 1000.0, "phase": "bind"}\n{"time_s": 1009.0, "phase": "done"}\n'
    )
    (run / "logs").mkdir()
    (run / "logs/output_workers.log").write_text(
        f"0: loading {path}/ckpt as {user}@{host}\n1: token={token} Authorization: Bearer {token}\n"
        f"srun: error: {host}: task 1: Killed\n2: peer 10.20.30.41:5000, SLURM_JOB_USER={user}, (Account={account})\n"
    )
    notebook = (
        json.dumps(NOTEBOOK)
        .replace("OUTPUT", f"{host}:8000 {path}/x {token}")
        .replace("PATH", f"/home/{user}/repo/05.ipynb")
    )
    (run / "notebooks").mkdir()
    (run / "notebooks/05_analysis.ipynb").write_text(notebook)
    (run / "tables").mkdir()
    (run / "tables/notes.csv").write_text(f'folder,who\n"{path}/runs/1",{user}\n')
    (run / "manifest.json").write_text(
        json.dumps({"versions": {"python": "3.11.2"}, "git": {"commit": "abc123"}})
    )
    return run


def survivors(folder, site):
    """Names of the site that are in any file, or file name, below a folder."""
    found = set()
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        raw = path.read_bytes() + path.relative_to(folder).as_posix().encode()
        found |= {(key, path.name) for key, value in site.items() if value.encode() in raw}
    return found


WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=10)
SITES = st.builds(
    lambda t, u, h, n, p, a, k: site(f"{k}{t}", f"zu{u}", f"zh{h}{n}", f"/zp{p}/{p}z/models", f"za_{a}"),
    st.text("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", min_size=24, max_size=36), WORD, WORD, st.integers(1, 999), WORD, WORD,
    st.sampled_from(["hf_A1", "ghp_", "nvapi-", "sk-", "glpat-"]),
)  # fmt: skip


def check_nothing_survives(tmp, names, name, write):
    run = make_site_run(tmp / "run", names)
    assert {key for key, _ in survivors(run, names)} == set(names)  # each is there before
    assert survivors(write(run, tmp / name).path, names) == set()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SITES)
def test_no_name_of_the_site_survives_in_a_crate(tmp_path_factory, names):
    tmp = tmp_path_factory.mktemp("site")
    check_nothing_survives(tmp, names, "crate", export_crate)
    assert b"10.20.30.41" not in (tmp / "crate/logs/output_workers.log").read_bytes()


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # three figures each
@given(SITES)
def test_no_name_of_the_site_survives_in_pages(tmp_path_factory, names):
    check_nothing_survives(tmp_path_factory.mktemp("site"), names, "html", export_html)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SITES)
def test_no_name_of_the_site_survives_in_a_kept_example(tmp_path_factory, names):
    check_nothing_survives(tmp_path_factory.mktemp("site"), names, "example", example.export_example)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SITES)
def test_no_name_of_the_site_survives_in_a_submission(tmp_path_factory, names):
    tmp = tmp_path_factory.mktemp("site")
    run, system = make_measured(tmp)
    for path in make_site_run(tmp / "other", names).rglob("*"):
        name = path.relative_to(tmp / "other")
        if (
            path.is_file()
            and name.parts[0] != "mlperf"
            and name.name not in ("experiment.yaml", "settings.json")
        ):
            (run / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, run / name)
    recorded = (tmp / "other/experiment.yaml").read_text().replace("value: rehearsal", "value: trtllm")
    (run / "experiment.yaml").write_text(recorded)
    assert {key for key, _ in survivors(run, names)} == set(names)
    tree = export_submission(run, tmp / "tree", system).path
    assert survivors(tree, names) == set() and len(list(tree.rglob("job.sh"))) == 1


#: a line of a log -> what of it may not stay, once the run has declared user zoe_site, host gpu17-rack3 and its paths
LINES = {
    "HF_TOKEN=canarytokenlowercase": "canarytokenlowercase",
    "Authorization: Bearer Zm9vYmFyMTIz.x": "Zm9vYmFyMTIz",
    "curl https://zoe:pa55word@hub.example/x": "pa55word",
    "--token s3cr3ts3cr3t": "s3cr3ts3cr3t",
    "password: hunter2hunter2": "hunter2hunter2",
    '"text": "one\\n/lustre/zother/x\\ngpu17-rack3"': "gpu17-rack3",
    '"text": "two\\n/lustre/zother/y"': "zother",
    "\x1b[31mgpu17-rack3\x1b[0m": "gpu17-rack3",
    "[nid00zq17:4711] *** Process received signal ***": "nid00zq17",
    "nid00zq18:99:101 [0] NCCL INFO x": "nid00zq18",
    "SLURM_NODELIST=zrack-[01-04]": "zrack",
    "image:/lustre/zimg/a.sqsh": "zimg",
    "-I/lustre/zinc/include": "zinc",
    "<td>/lustre/zcell/x</td>": "zcell",
    "/lustre/zproj/models_of_zanna/x": "zanna",
    "mail zora@zcorp.example": "zora",
    "File '/Users/zuser/x.py'": "zuser",
}


@pytest.mark.parametrize("line", LINES)
def test_forms_in_which_names_stand_in_logs_are_replaced(tmp_path, line):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/more.log").write_text(f"before {line}\n{line}\n")
    export_crate(run, tmp_path / "crate")
    assert LINES[line] not in (tmp_path / "crate/logs/more.log").read_text()


@pytest.mark.parametrize(
    "line",
    ["POST http://127.0.0.1:8000/v1/completions 200", "GET /health 200", "TRT_VER=10.11.0.33", "use_token_latencies: true",
     "time 3/4 of 10/20", "first_token_latency = 4500000000", "*.Server.target_qps = 3.85", "a/b/c is relative", "token: null",
     "</p></div>", "https://w3id.org/ro/crate/1.1", "tokens: 123456789", "[TRT-LLM] [I] rank 0 of node 3"],
)  # fmt: skip
def test_ordinary_lines_stay_as_they_are(tmp_path, line):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/more.log").write_text(line + "\n")
    export_crate(run, tmp_path / "crate")
    assert (tmp_path / "crate/logs/more.log").read_text() == line + "\n"


def test_redacted_files_are_still_json_yaml_and_jsonl(tmp_path):
    folder = export_crate(make_site_run(tmp_path / "run", site()), tmp_path / "crate").path
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    assert found.read_parameters(folder / "experiment.yaml")["account"] == "REDACTED_account1"
    assert rows.run_row(folder)["ttft_p99_ms"] == rows.run_row(tmp_path / "run")["ttft_p99_ms"]


def test_replacements_are_listed_without_the_originals(tmp_path):
    shared = export_crate(make_site_run(tmp_path / "run", site()), tmp_path / "crate")
    listed = json.loads((tmp_path / "crate/redaction.json").read_text())
    assert {item["placeholder"] for item in shared.replaced} >= {
        "REDACTED_token",
        "REDACTED_user1",
        "REDACTED_address",
    }
    assert listed and all(set(item) == {"file", "placeholder", "times"} for item in listed)
    assert "Replaced: " in shared.text()


def test_run_folder_itself_is_not_changed(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    export_html(run, tmp_path / "html")
    export_crate(run, tmp_path / "crate")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("path", ["/data/my run/x y", "/data/it's/here", '/data/a"b/c', "/data/ä/ö"])
def test_odd_paths_of_parameters_are_replaced_in_json_yaml_and_html(tmp_path, path):
    run = make_site_run(tmp_path / "run", site())
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())
    recorded["parameters"]["work_dir"]["value"] = path
    (run / "experiment.yaml").write_text(yaml.safe_dump(recorded, allow_unicode=True, width=1000))
    (run / "job/extra.json").write_text(json.dumps({"dir": path}))
    (run / "logs/extra.log").write_text(f"cd {path}\n")
    export_crate(run, tmp_path / "crate")
    text = (tmp_path / "crate/job/extra.json").read_text() + (tmp_path / "crate/logs/extra.log").read_text()
    assert path not in text and path.split("/")[-1] + '"' not in text and "REDACTED_path" in text


def test_secret_in_a_picture_is_refused_and_nothing_is_left_behind(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "figures").mkdir()
    (run / "figures/x.png").write_bytes(b"\x89PNG hf_Q7abcdefghijklmnopq1234")
    with pytest.raises(SecretError, match=r"figures/x\.png: found REDACTED_token"):
        export_crate(run, tmp_path / "out/crate")
    assert list((tmp_path / "out").iterdir()) == []


def test_private_key_is_replaced_whole(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/key.log").write_text(
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAAsecret\nBBBBsecret\n-----END OPENSSH PRIVATE KEY-----\nafter\n"
    )
    export_crate(run, tmp_path / "crate")
    assert (tmp_path / "crate/logs/key.log").read_text() == "REDACTED_token\nafter\n"


def test_links_and_files_that_cannot_be_searched_stay_here(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/blob").write_bytes(b"\0\1\2\xff")
    (run / "logs/link").symlink_to("/etc/passwd")
    shared = export_crate(run, tmp_path / "crate")
    assert {item.split(":")[0] for item in shared.left_out} == {"logs/blob", "logs/link"}
    assert not (tmp_path / "crate/logs/link").exists()


def test_figures_of_the_table_are_not_mistaken_for_names(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    outputs.write_outputs(run)
    export_crate(run, tmp_path / "crate")
    before = (run / "mlperf/performance" / DETAIL).read_text()
    assert (tmp_path / "crate/mlperf/performance" / DETAIL).read_text() == before
    assert "32.712445" in (tmp_path / "crate/tables/run_rehearsed.csv").read_text()


def test_nothing_is_overwritten(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="is already there"):
        export_html(run, tmp_path / "there")


def test_only_run_folders_are_shared(tmp_path):
    with pytest.raises(ExportError, match="needed a run folder"):
        export_html(DATA, tmp_path / "html")


# -- pages


def test_pages_load_nothing_and_the_index_says_it_all(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    shared = export_html(run, tmp_path / "html")
    assert sorted(p.name for p in shared.path.iterdir()) == ["05_analysis.html", "index.html"]
    for page in shared.path.iterdir():
        text = page.read_text()
        assert "<script" not in text and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        assert not re.search(r"@import|url\(\s*['\"]?http", text)
    index = (shared.path / "index.html").read_text()
    assert "rehearsed" in index and "Shortened on purpose" in index and "python 3.11.2" in index
    assert (
        index.count("data:image/png;base64,") == 4
        and "python -m disagg_lib run params/site.yaml -p account" in index
    )


def test_pages_follow_the_readers_dark_setting_and_link_to_pages_that_are_there():
    cells = [
        {
            "cell_type": "markdown",
            "id": "b",
            "metadata": {},
            "source": "[next](05_a.ipynb) [gone](02_plan.ipynb)",
        }
    ]
    page = pages.notebook_page(json.dumps({**NOTEBOOK, "cells": cells}), ["05_a"])
    assert "@media (prefers-color-scheme: dark)" in page and 'href="05_a.html"' in page
    assert ".ipynb" not in page and ">gone</a>" in page


def test_index_of_a_failed_run_says_why_there_is_no_verdict(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    (run / "mlperf/performance" / SUMMARY).write_text("")
    index = (export_html(run, tmp_path / "html").path / "index.html").read_text()
    assert "NO RESULT" in index and "cut log" in index and index.count("data:image/png") == 2


def test_the_command_to_repeat_a_run_is_quoted(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())
    recorded["parameters"]["test_modes"] = {"value": ["performance"], "from": "given"}
    (run / "experiment.yaml").write_text(yaml.safe_dump(recorded))
    command = repeat_command(run)
    assert command.startswith("python -m disagg_lib run params/site.yaml -p ")
    assert """-p test_modes '["performance"]'""" in command


# -- crate


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


# -- submission


def make_measured(folder, division="open"):
    """A valid, measured run folder with its evaluation, and a system description."""
    run = make_run(folder / "run", kind="logs_full", engine="trtllm")
    whole = make_valid(folder / "whole")
    shutil.copytree(whole / "accuracy", run / "mlperf/accuracy")
    log = (
        b"[\n"
        + b",\n".join(
            b'{ "seq_id" : %d, "qsl_idx" : %d, "data" : "%s" }' % (i, i, b"07000000" * 50) for i in range(60)
        )
        + b"\n]\n"
    )
    (run / "mlperf/accuracy" / ACCURACY).write_bytes(log)
    text = (run / "mlperf/accuracy/accuracy.txt").read_text()
    (run / "mlperf/accuracy/accuracy.txt").write_text(
        re.sub("hash=.*", f"hash={hashlib.sha256(log).hexdigest()}", text)
    )
    (run / "user.conf").write_text("*.Server.target_qps = 13\n")
    (run / "job.sh").write_text("#!/bin/bash\ncd /lustre/zproj/models\n")
    system = yaml.safe_load((REPOSITORY / "params/system.example.yaml").read_text())
    system = {key: value or "x" for key, value in system.items()} | {
        "division": division,
        "submitter": "Nobody",
    }
    (folder / "system.yaml").write_text(yaml.safe_dump(system))
    return run, folder / "system.yaml"


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


# -- rebuilt


def test_tables_and_figures_are_rebuilt_to_the_byte_wherever_the_run_lies(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    outputs.write_outputs(run)
    (run / "tables/notes.csv").unlink()
    assert set(recompute(run)["word"]) == {"same"} and len(recompute(run)) == 6
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere/run"))
    assert set(recompute(moved)["word"]) == {"same"}


def test_edited_table_and_raw_log_are_found(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    outputs.write_outputs(run)
    table = run / "tables/run_rehearsed.csv"
    table.write_text(table.read_text().replace("4394", "5394"))
    (run / "figures/topology_rehearsed.png").unlink()
    words = recompute(run).set_index("file")["word"].to_dict()
    assert (
        words["tables/run_rehearsed.csv"] == "differs"
        and words["figures/topology_rehearsed.png"] == "absent before"
    )
    assert words["tables/notes.csv"] == "not rebuilt" and words["figures/latency_rehearsed.png"] == "same"
