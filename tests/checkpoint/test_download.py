"""Download and digests, with the real huggingface_hub client against a hub on this machine that does wrong on purpose."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import huggingface_hub
import pytest
import yaml
from hub_server import Fault, HubServer

from disagg_lib.checkpoint import digests, download, synthetic
from disagg_lib.checkpoint.digests import cite_model, manifest_path, verify_digests
from disagg_lib.checkpoint.download import download_checkpoint, hub_listing
from disagg_lib.checkpoint.hub import FIXES, HubError
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.errors import ModelError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.files import REPOSITORY

REPO = "nvidia/Llama-3.1-405B-Instruct-FP4"
SHARD = "model-00001-of-00002.safetensors"
CANARY = "hf_" + "canary" * 5  # joined here, so that no tracked file holds what looks like a token


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The synthetic checkpoint's files, with one shard of 3 MB."""
    folder = make_rehearsal_checkpoint(tmp_path_factory.mktemp("hub") / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["model-00001-of-00002.safetensors"] = bytes(range(256)) * 12000
    files[".gitattributes"] = b"*.safetensors filter=lfs\n"
    return files


@pytest.fixture(name="hub")
def hub_on_this_machine(contents, monkeypatch):
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()  # it reads the proxy's variables once
    with HubServer({REPO: dict(contents)}) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def fetch(hub, tmp_path):
    """fetch(**more): download into tmp_path/model; the progress notes are in fetch.notes."""

    def call(folder=tmp_path / "model", **more):
        def report(p):
            if p.note:
                call.notes.append(p.note)

        return download_checkpoint(
            folder, REPO, endpoint=hub.endpoint, **{"margin_bytes": 0, "report": report, **more}
        )

    call.notes = []
    return call


def visible(contents):
    return {name: content for name, content in contents.items() if not name.startswith(".")}


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_test_hub_serves_the_hub_librarys_own_download(hub, contents, tmp_path):
    huggingface_hub.snapshot_download(
        REPO, local_dir=tmp_path / "its", endpoint=hub.endpoint, cache_dir=tmp_path / "c"
    )
    for name, content in visible(contents).items():
        assert (tmp_path / "its" / name).read_bytes() == content


def test_a_download_makes_the_folder_and_a_manifest_with_the_commit(fetch, hub, contents, tmp_path):
    commit = fetch()
    assert read(tmp_path / "model") == visible(contents)
    manifest = json.loads(manifest_path(tmp_path / "model").read_text())
    assert (manifest["revision"], manifest["repo"]) == (commit, REPO) == (hub.commits[REPO], REPO)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.lock", "model", "model.manifest.json"]


def test_every_file_is_asked_for_by_commit_and_the_cdn_sees_no_token(fetch, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.token = CANARY
    fetch()
    resolved = [s for s in hub.seen if "/resolve/" in s.path]
    assert resolved and all(f"/resolve/{hub.commits[REPO]}/" in s.path for s in resolved)
    assert [s.authorization for s in hub.seen if s.path.startswith("/cdn/")] == [None, None]


def test_a_complete_folder_needs_no_network(fetch, hub):
    fetch()
    before = len(hub.seen)
    fetch()
    assert len(hub.seen) == before


def test_a_moved_branch_does_not_move_a_folder_that_has_its_commit(fetch, hub):
    commit = fetch()
    hub.commits[REPO] = "f" * 40
    assert fetch() == commit


def test_a_connection_cut_in_the_middle_goes_on_with_no_byte_twice(fetch, hub, contents, tmp_path):
    hub.faults = [
        Fault(rf"/cdn/.*{SHARD}", cut_after=1_000_001),
        Fault(rf"/cdn/.*{SHARD}", cut_after=500_000),
    ]
    fetch()
    assert hub.bytes_sent(SHARD) == len(contents[SHARD])
    firsts = [s.first_byte for s in hub.seen if s.path.startswith("/cdn/") and SHARD in s.path]
    assert firsts == [0, 1_000_001, 1_500_001]
    assert (tmp_path / "model" / SHARD).read_bytes() == contents[SHARD]


CHILD = """
import sys
from pathlib import Path
from disagg_lib.checkpoint.download import download_checkpoint
download_checkpoint(Path(sys.argv[1]), sys.argv[2], endpoint=sys.argv[3], margin_bytes=0)
"""


@pytest.fixture
def child(hub):
    """child(folder, **environment): a download in a process of its own, ended with the test.

    It heeds SIGINT, also where these tests run in a shell's background.
    """
    with contextlib.ExitStack() as processes:

        def start(folder, **environment):
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(folder), REPO, hub.endpoint],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def part_sizes(tmp_path):
    sizes = []
    for path in (tmp_path / ".model.parts").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # whole, and moved to its place just now
            sizes.append(path.stat().st_size)
    return sizes


def test_a_killed_process_is_gone_on_from_to_the_byte(fetch, hub, child, contents, tmp_path):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=1_000_000)]
    process = child(tmp_path / "model")
    wait_until(lambda: max(part_sizes(tmp_path), default=0) > 500_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = max(part_sizes(tmp_path))
    fetch()
    again = [s for s in hub.seen if s.path.startswith("/cdn/") and SHARD in s.path][-1]
    assert (again.first_byte, again.sent) == (kept, len(contents[SHARD]) - kept)
    assert read(tmp_path / "model") == visible(contents)


def test_an_interrupt_ends_a_download_at_once_and_keeps_what_came(fetch, hub, child, contents, tmp_path):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=500_000)]
    process = child(tmp_path / "model")
    wait_until(lambda: max(part_sizes(tmp_path), default=0) > 100_000)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=5)  # the rest would take 6 s
    assert said.rstrip().endswith("KeyboardInterrupt")
    fetch()
    assert hub.bytes_sent(SHARD) < len(contents[SHARD]) + 500_000  # the rest, and what was on its way


def test_a_second_download_at_once_is_refused_with_the_lock_named(fetch, hub, child, contents, tmp_path):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=2_000_000)]
    process = child(tmp_path / "model")
    wait_until(lambda: part_sizes(tmp_path))
    with pytest.raises(HubError, match="another download is writing it .it holds .model.lock") as caught:
        fetch()
    assert caught.value.kind == "locked"
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert read(tmp_path / "model") == visible(contents)


def test_a_byte_flipped_on_the_way_is_found_named_and_fetched_again(fetch, hub, contents, tmp_path):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", flip=1234)]
    fetch()
    assert [note for note in fetch.notes if SHARD in note and "arrived damaged" in note]
    assert (tmp_path / "model" / SHARD).read_bytes() == contents[SHARD]


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_file_that_arrives_damaged_twice_ends_the_download(fetch, hub, tmp_path, name):
    hub.faults = [Fault(rf"/(cdn|resolve)/.*{name}", times=9, flip=7)]
    with pytest.raises(HubError, match=f"{name}: damaged twice"):
        fetch()
    assert not (tmp_path / "model" / name).exists()


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_byte_flipped_on_disk_is_found_named_and_fetched_again(fetch, hub, contents, tmp_path, name):
    fetch()
    path = tmp_path / "model" / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    (check,) = verify_digests(tmp_path / "model", lambda p: None)
    assert not check.ok and check.found.startswith(f"{name}: SHA-256 ")
    before = len(hub.seen)
    fetch()
    assert read(tmp_path / "model") == visible(contents)
    assert {s.path.split("?")[0].rsplit("/", 1)[1] for s in hub.seen[before:]} == {name}
    assert verify_digests(tmp_path / "model", lambda p: None)[0].ok


def test_a_file_that_is_gone_is_named_and_fetched(fetch, contents, tmp_path):
    fetch()
    (tmp_path / "model/tokenizer.json").unlink()
    assert verify_digests(tmp_path / "model", lambda p: None)[0].found == "tokenizer.json: absent"
    fetch()
    assert read(tmp_path / "model") == visible(contents)


def test_files_that_another_hand_put_there_are_taken_if_they_are_the_hubs(fetch, hub, contents, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / SHARD).write_bytes(contents[SHARD])
    fetch()
    assert hub.bytes_sent(SHARD) == 0
    assert read(tmp_path / "model") == visible(contents)


def test_files_that_another_hand_put_there_are_never_overwritten(fetch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(HubError, match="config.json: 2 bytes, the hub has") as caught:
        fetch()
    assert caught.value.kind == "foreign files"
    assert (tmp_path / "model/config.json").read_text() == "{}"


def test_a_model_of_another_repository_is_never_overwritten(fetch, hub, tmp_path):
    fetch()
    hub.repos["other/model"] = {"config.json": b"{}"}
    hub.commits["other/model"] = "e" * 40
    with pytest.raises(HubError, match="foreign files"):
        download_checkpoint(tmp_path / "model", "other/model", endpoint=hub.endpoint, margin_bytes=0)
    fetch()


def test_a_newer_commit_fetches_only_what_changed(fetch, hub, tmp_path):
    fetch()
    hub.commits[REPO], before = "f" * 40, len(hub.seen)
    hub.repos[REPO]["config.json"] = b"{}"
    assert fetch(revision="f" * 40) == "f" * 40
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"
    assert len([s for s in hub.seen[before:] if "/resolve/" in s.path]) == 1


def test_a_shard_that_is_not_the_hubs_is_named(fetch, tmp_path):
    fetch()
    (tmp_path / "model/model-00003-of-00003.safetensors").write_bytes(b"")
    (check,) = verify_digests(tmp_path / "model", lambda p: None)
    assert not check.ok and check.found == "model-00003-of-00003.safetensors: not one of the hub's"


def test_a_server_without_ranges_is_read_from_the_start(fetch, hub, contents, tmp_path, monkeypatch):
    from hub_server import _Handler

    whole = _Handler._file

    def without_range(self, *arguments):
        self.seen.range = None
        whole(self, *arguments)

    monkeypatch.setattr(_Handler, "_file", without_range)
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", cut_after=1_000_000)]
    fetch()
    assert read(tmp_path / "model") == visible(contents)


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
    ("too many requests", "/cdn/", Fault("", times=99, status=429, headers={"Retry-After": "3600"}), None),
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


@pytest.mark.parametrize("path", [API, "/resolve/", "/cdn/"])
def test_a_short_retry_after_is_waited_out(fetch, hub, contents, tmp_path, path):
    hub.faults = [Fault(path, times=2, status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    fetch(workers=1)
    assert 2 <= time.monotonic() - began < 12
    assert read(tmp_path / "model") == visible(contents)


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


def test_two_files_of_one_content_are_both_fetched(fetch, hub, contents, tmp_path):
    hub.repos[REPO] = {**hub.repos[REPO], "copy.safetensors": contents[SHARD], "d/e.bin": contents[SHARD]}
    fetch()
    for name in (SHARD, "copy.safetensors", "d/e.bin"):
        assert (tmp_path / "model" / name).read_bytes() == contents[SHARD]
    assert verify_digests(tmp_path / "model", lambda p: None)[0].ok


def test_offline_mode_is_named_before_and_in_the_middle(fetch, monkeypatch, tmp_path):
    fetch()
    (tmp_path / "model/config.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for folder in (tmp_path / "model", tmp_path / "other"):
        with pytest.raises(HubError) as caught:
            fetch(folder)
        assert caught.value.kind == "offline"


def test_a_checkpoint_brought_by_hand_is_taken_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    e = load_experiment((), {"engine": "trtllm", "model_dir": str(tmp_path / "model")})
    with pytest.raises(HubError, match="no network"):
        download.obtain_checkpoint(e)
    quantization = make_rehearsal_checkpoint(tmp_path / "model") / "hf_quant_config.json"
    quantization.write_text(quantization.read_text().replace(synthetic.SYNTHETIC, "modelopt"))
    assert download.obtain_checkpoint(e) == tmp_path / "model"
    assert "compared with nothing" in capsys.readouterr().out
    checks = digests.checkpoint_checks(e, lambda p: None)
    assert "nothing to compare with" in checks[-1].found and cite_model(tmp_path / "model")["repo"] is None


def test_a_rehearsals_checkpoint_and_the_real_one_are_told_apart_in_their_one_place(tmp_path):
    given = {"scratch_dir": str(tmp_path)}
    rehearsal = load_experiment((), {**given, "engine": "rehearsal", "container": "none"})
    folder = download.obtain_checkpoint(rehearsal)
    with pytest.raises(ModelError, match="found a rehearsal's synthetic checkpoint. Set scratch_dir"):
        download.obtain_checkpoint(load_experiment((), given))
    assert download.obtain_checkpoint(rehearsal) == folder
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ModelError, match="found a checkpoint that is no rehearsal's"):
        download.obtain_checkpoint(rehearsal)


def test_a_manifest_that_is_none_says_what_to_do(tmp_path):
    for text in ("{", '{"expected": {"a": {"bytes": 1}}}'):
        manifest_path(tmp_path / "model").write_text(text)
        with pytest.raises(ModelError, match="Move it away and run 01_model_download again"):
            cite_model(tmp_path / "model")


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
    """On a real file system of 4 MB, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    script = textwrap.dedent(f"""
        import os, subprocess, sys
        from pathlib import Path
        from disagg_lib.checkpoint.download import download_checkpoint
        from disagg_lib.checkpoint.hub import FIXES, HubError
        place = Path({str(place)!r})
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
        filler = place / "filler"
        def fill(p):  # called before the first byte: another user takes the room
            filler.exists() or filler.write_bytes(bytes(2_500_000))
        def fetch(report):
            return download_checkpoint(place / "model", {REPO!r}, endpoint={hub.endpoint!r}, margin_bytes=0, report=report)
        try:
            fetch(fill)
        except HubError as error:
            print(error.kind, error)
        kept = sum(p.stat().st_size for p in place.glob(".model.parts/*"))
        filler.unlink()
        print("kept", kept, "then", len(fetch(lambda p: None)))
    """)
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script]
    if shutil.which("unshare") is None or subprocess.run([*command[:-2], "-c", ""]).returncode:
        pytest.skip("no mount namespaces for this user: nowhere to make a small file system")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("disk full ")
    kept = int(second.split()[1])
    assert kept > 100_000 and second.endswith("then 40")
    last = [s for s in hub.seen if s.path.startswith("/cdn/") and SHARD in s.path][-1]
    assert last.first_byte + last.sent == len(contents[SHARD])


def test_the_manifest_is_what_runs_cite(fetch, hub, tmp_path):
    folder = tmp_path / "model"
    assert cite_model(folder) is None
    fetch()
    cited = cite_model(folder)
    assert (cited["repo"], cited["revision"], len(cited["digest"])) == (REPO, hub.commits[REPO], 64)
    os.utime(folder / "config.json")
    with pytest.raises(ModelError, match="config.json has changed since it was verified"):
        cite_model(folder)
    verify_digests(folder, lambda p: None)
    assert cite_model(folder)["digest"] == cited["digest"]


def test_a_verification_reads_only_what_changed(fetch, tmp_path, monkeypatch):
    fetch()
    os.utime(tmp_path / "model/config.json")
    hashed = []
    monkeypatch.setattr(
        digests,
        "hash_file",
        lambda path, add, git, real=digests.hash_file: hashed.append(path.name) or real(path, add, git),
    )
    verify_digests(tmp_path / "model", lambda p: None)
    assert hashed == ["config.json"]


def test_a_verification_that_was_interrupted_goes_on(fetch, tmp_path, monkeypatch):
    fetch()
    manifest = json.loads(manifest_path(tmp_path / "model").read_text())
    manifest_path(tmp_path / "model").write_text(json.dumps(manifest | {"files": {}}))
    hashed = []

    def slowly(path, add, git, real=digests.hash_file):
        time.sleep(0.4)
        hashed.append(path.name)
        return real(path, add, git)

    def interrupt(p):
        if p.files_done:
            raise KeyboardInterrupt

    monkeypatch.setattr(digests, "hash_file", slowly)
    with pytest.raises(KeyboardInterrupt):
        verify_digests(tmp_path / "model", interrupt)
    kept = json.loads(manifest_path(tmp_path / "model").read_text())["files"]
    assert 0 < len(kept) < 6
    hashed.clear()
    verify_digests(tmp_path / "model", lambda p: None)
    assert sorted(hashed) == sorted(set(manifest["files"]) - set(kept))


def test_a_synthetic_checkpoint_gets_a_manifest_that_says_it_is_from_no_hub(tmp_path):
    folder = make_rehearsal_checkpoint(tmp_path / "model")
    (check,) = verify_digests(folder, lambda p: None)
    assert check.ok and "not from a hub" in check.found
    assert cite_model(folder)["repo"] is None


def test_progress_on_no_terminal_is_few_whole_lines(fetch, capsys):
    fetch(report=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("download: 6/6 files") and "\r" not in "".join(lines)
    assert len(lines) <= 3


def test_progress_on_a_terminal_is_one_line_that_renews_itself(fetch, hub, capsys, monkeypatch):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=2_000_000)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fetch(report=None)
    (line, rest) = capsys.readouterr().out.split("\n")
    states = line.split("\r\x1b[K")
    assert not rest
    assert len(states) > 3 and states[-1].startswith("download: 6/6 files")
    rates = [int(rate) for state in states[2:] for rate in re.findall(r"(\d+) MB/s, 0:00:0\d left$", state)]
    assert rates and 0 < max(rates) < 10


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
    assert ("download: 6/6 files" in executed) is not refused
    assert not [text for text in (done.stdout, done.stderr, executed) if CANARY in text]


def test_the_listing_says_what_the_hub_says(hub):
    commit, files = hub_listing(REPO, None, hub.endpoint)
    assert commit == hub.commits[REPO]
    assert files[SHARD].sha256 and not files["config.json"].sha256 and files["config.json"].git_sha1
