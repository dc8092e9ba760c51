"""What the hub, the way to it or the disk can say: named, with what to do, and no secret told."""

import shutil
import subprocess
import sys
import textwrap
import time

import huggingface_hub
import pytest
import yaml
from hub_server import CANARY, REPO, SHARD, SIGNATURE, Fault

from disagg_lib.checkpoint.download import download_checkpoint
from disagg_lib.checkpoint.hub import FIXES, HubError
from disagg_lib.errors import ModelError
from disagg_lib.files import REPOSITORY

API = r"^/api/models/"
NAMED = [
    (
        "gated",
        API,
        Fault("", status=403, body={"error": "restricted"}, headers={"X-Error-Code": "GatedRepo"}),
        CANARY,
    ),
    ("gated", API, Fault("", status=401, headers={"X-Error-Code": "GatedRepo"}), None),
    ("no token", API, Fault("", status=401), None),
    ("token refused", API, Fault("", status=401), CANARY),
    ("forbidden", API, Fault("", status=403), CANARY),
    ("forbidden", "/cdn/", Fault("", times=99, status=403), None),
    ("missing repository", API, Fault("", status=404, headers={"X-Error-Code": "RepoNotFound"}), None),
    ("missing repository", "/resolve/", Fault("", times=99, status=404), None),
    ("missing revision", API, Fault("", status=404, headers={"X-Error-Code": "RevisionNotFound"}), None),
    ("too many requests", API, Fault("", status=429, headers={"Retry-After": "3600"}), None),
    ("hub error", API, Fault("", status=501), None),
    ("proxy", API, Fault("", status=407), None),
]


@pytest.mark.parametrize(("kind", "path", "fault", "token"), NAMED)
def test_each_refusal_has_its_name_and_its_fix(fetch, hub, monkeypatch, kind, path, fault, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults = [Fault(**{**vars(fault), "path": path})]
    with pytest.raises(HubError) as caught:
        fetch()
    assert caught.value.kind == kind
    assert str(caught.value).endswith(FIXES[kind])


@pytest.mark.parametrize("path", ["/resolve/", "/cdn/"])
def test_a_short_retry_after_is_waited_out(fetch, hub, path):
    hub.faults = [Fault(path, times=2, status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    fetch(workers=1)
    assert time.monotonic() - began >= 2


def test_no_network_is_named_at_once(hub, tmp_path, monkeypatch):
    began = time.monotonic()
    with pytest.raises(HubError) as caught:
        download_checkpoint(tmp_path / "model", REPO, endpoint="http://127.0.0.1:1")
    assert caught.value.kind == "no network" and time.monotonic() - began < 5


def test_a_proxy_that_refuses_is_named_without_its_password(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{CANARY}@127.0.0.1:{hub.port}")
    with pytest.raises(HubError) as caught:
        download_checkpoint(tmp_path / "model", REPO, endpoint="https://hub.invalid")
    assert caught.value.kind == "proxy" and CANARY not in str(caught.value)


def test_a_repository_name_that_is_none_is_refused(hub, tmp_path):
    with pytest.raises(HubError) as caught:
        download_checkpoint(tmp_path / "model", "no/such/name", endpoint=hub.endpoint)
    assert caught.value.kind == "missing repository"


@pytest.mark.parametrize(("variable", "value"), [("HF_TOKEN", "hf_\u2026"), ("HTTP_PROXY", "ftp://u:hf_x@y")])
def test_a_setting_that_no_request_can_be_made_with_is_named(fetch, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(HubError) as caught:
        fetch()
    assert caught.value.kind == {"HF_TOKEN": "token refused", "HTTP_PROXY": "proxy"}[variable]
    assert "hf_x" not in str(caught.value)


@pytest.mark.parametrize("page", ["<html>Please log in to the network</html>", {}])
def test_a_portals_page_is_not_taken_for_the_hub(fetch, hub, page):
    hub.faults = [Fault(API, status=200, body=page)]
    with pytest.raises(HubError, match="proxy: no hub's answer") as caught:
        fetch()
    assert caught.value.kind == "proxy"


def test_the_password_of_a_mirror_is_not_shown(tmp_path):
    with pytest.raises(HubError, match="http://[*]{3}@127.0.0.1:1: no network") as caught:
        download_checkpoint(tmp_path / "model", REPO, endpoint=f"http://user:{CANARY[3:]}@127.0.0.1:1")
    assert CANARY[3:] not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(fetch, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/model", tmp_path / ("x" * 300)):
        with pytest.raises(
            HubError, match="file system: .*Set scratch_dir .or model_dir. to a folder"
        ) as caught:
            fetch(folder)
        assert caught.value.kind == "file system"


def test_offline_mode_is_named_before_and_in_the_middle(fetch, monkeypatch, tmp_path):
    fetch()
    (tmp_path / "model/config.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for folder in (tmp_path / "model", tmp_path / "other"):
        with pytest.raises(HubError) as caught:
            fetch(folder)
        assert caught.value.kind == "offline"


def test_a_file_name_that_leaves_the_folder_is_refused(hub, tmp_path):
    hub.repos[REPO]["../outside"] = b"x"
    with pytest.raises(ModelError, match="outside its folder"):
        download_checkpoint(tmp_path / "model", REPO, endpoint=hub.endpoint)
    assert not (tmp_path / "outside").exists()


def test_too_little_room_is_refused_before_the_first_byte(fetch, hub):
    with pytest.raises(HubError, match="disk full: found .* GB free, needed") as caught:
        fetch(margin_bytes=10**18)
    assert caught.value.kind == "disk full" and hub.bytes_sent(SHARD) == 0


def test_a_disk_that_fills_up_is_named_and_what_came_is_kept(hub, contents, tmp_path):
    """On a real file system of 7 MB, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    script = textwrap.dedent(f"""
        import subprocess
        from pathlib import Path
        import huggingface_hub
        from disagg_lib.checkpoint.download import download_checkpoint
        from disagg_lib.checkpoint.hub import HubError
        place = Path({str(place)!r})
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", place], check=True)
        filler, real = place / "filler", huggingface_hub.snapshot_download
        def room_is_taken(*arguments, **more):  # by another user, after our look at it
            filler.write_bytes(bytes(2_500_000))
            return real(*arguments, **more)
        def fetch():
            return download_checkpoint(place / "model", {REPO!r}, endpoint={hub.endpoint!r}, margin_bytes=0, workers=1)
        try:
            huggingface_hub.snapshot_download = room_is_taken
            fetch()
        except HubError as error:
            print(error.kind, error)
        print("kept", sum(p.stat().st_size for p in place.glob("model/*") if p.is_file()))
        filler.unlink()
        huggingface_hub.snapshot_download = real
        print("then", len(fetch()))
    """)
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script]
    if shutil.which("unshare") is None or subprocess.run([*command[:-2], "-c", ""]).returncode:
        pytest.skip("no mount namespaces for this user: nowhere to make a small file system")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, kept, then = done.stdout.strip().splitlines()
    assert first.startswith("disk full ") and then == "then 40"
    assert 0 < int(kept.split()[1]) < 4_500_000


def test_the_signature_of_an_address_is_not_in_the_librarys_warnings(hub, child, tmp_path):
    hub.faults = [Fault("/cdn/", status=429, headers={"Retry-After": "1"})]
    said = child(tmp_path / "model").communicate(timeout=60)[0]
    assert "HTTP Error 429" in said and SIGNATURE not in said


def test_no_token_appears_anywhere(hub, child, tmp_path):
    """The canary: in the output of success and failure, and in every file left; from a server that echoes it, too."""
    hub.token = CANARY
    echo = {
        "status": 403,
        "body": {"error": f"token {CANARY} may not"},
        "headers": {"X-Error-Message": CANARY},
    }
    texts = []
    for faults in ([Fault(API, **echo)], [Fault("/cdn/", times=2, **echo)], []):
        hub.faults = faults
        process = child(tmp_path / "model", HF_TOKEN=CANARY, HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
        texts.append(process.communicate(timeout=60)[0])
    assert "forbidden" in texts[0] and "forbidden" in texts[1] and process.returncode == 0
    texts += [p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()]
    assert [text for text in texts if CANARY in text] == []
    assert any("Bearer" in (s.authorization or "") for s in hub.seen)


@pytest.mark.parametrize("refused", [False, True])
def test_no_token_appears_in_an_executed_notebook(hub, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.token = CANARY
    hub.faults = [Fault(API, status=403, body={"error": f"token {CANARY} may not"})] if refused else []
    out, params = tmp_path / "out.ipynb", tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"engine": "trtllm", "scratch_dir": str(tmp_path / "scratch")}))
    notebook = REPOSITORY / "notebooks/01_model_download.ipynb"
    command = [sys.executable, "-m", "papermill", "--log-output", notebook, out]
    command += ["-y", yaml.safe_dump({"params_files": [str(params)]})]
    done = subprocess.run(command, cwd=REPOSITORY / "notebooks", capture_output=True, text=True, timeout=120)
    executed = out.read_text()
    # The small checkpoint comes whole, and is then refused: it is not the 405B one that the parameters ask for.
    last_word = "forbidden: 403" if refused else "num_hidden_layers: 126: found 2"
    assert done.returncode == 1 and last_word in done.stderr
    assert ("8 files" in executed) is not refused
    assert not [text for text in (done.stdout, done.stderr, executed) if CANARY in text]
