"""Redaction: nothing of the site's names may be in anything that leaves it."""

import json
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import DATA
from shared_runs import make_measured, make_site_run, record, site, survivors

from disagg_lib.errors import ExportError, SecretError
from disagg_lib.results import found, outputs, rows
from disagg_lib.results.logs import DETAIL
from disagg_lib.sharing import example
from disagg_lib.sharing.crate import export_crate
from disagg_lib.sharing.pages import export_html
from disagg_lib.sharing.submission import export_submission

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
    (run / "user.conf").write_text("*.Server.target_qps = 13\n")
    record(run)
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
    "peer fd12:3456:789a::17 port 5000": "fd12:3456:789a::17",
    "link fe80::1ff:fe23:4567:890a%ib0": "fe80::1ff",
    "listening on [2001:db8:0:1:1:1:1:1]:8000": "2001:db8",
    "ether 3c:ec:ef:12:34:56 txqueuelen": "3c:ec:ef:12:34:56",
    "node_guid: 0c42:a103:0012:3456": "0c42:a103",
    "port GUID 0x0c42a10300123456": "0c42a103",
    "GPU 0: NVIDIA GB200 (UUID: GPU-01234567-89ab-cdef-0123-456789abcdef)": "89ab-cdef",
    "docker://registry.zcorp.example/team/x:1": "zcorp",
    "--container-image=images.zcorp.example#team/x:1": "zcorp",
    "account=zacct7": "zacct7",
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
     "</p></div>", "https://w3id.org/ro/crate/1.1", "tokens: 123456789", "12:34:56 01:02:03", "x[1::2]", "std::vector", "nvcr.io/nvidia/x:1", "[TRT-LLM] [I] rank 0 of node 3"],
)  # fmt: skip
def test_ordinary_lines_stay_as_they_are(tmp_path, line):
    run = make_site_run(tmp_path / "run", site())
    (run / "logs/more.log").write_text(line + "\n")
    export_crate(run, tmp_path / "crate")
    assert (tmp_path / "crate/logs/more.log").read_text() == line + "\n"


def test_names_of_two_letters_are_replaced(tmp_path):
    run = make_site_run(tmp_path / "run", site(user="qz", account="xy"))
    (run / "logs/more.log").write_text("qz started it for xy; in ms\n")
    export_crate(run, tmp_path / "crate")
    text = (tmp_path / "crate/logs/more.log").read_text()
    assert "qz" not in text and "xy" not in text and "; in ms" in text


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
