"""Download with the real huggingface_hub client against a hub on this machine that does wrong on purpose."""

import contextlib
import json
import signal
import time

import huggingface_hub
import pytest
from hub_server import CANARY, REPO, SHARD, Fault

from disagg_lib.checkpoint import digests, download, synthetic
from disagg_lib.checkpoint.digests import cite_model, manifest_path, verify_digests
from disagg_lib.checkpoint.download import download_checkpoint, hub_listing
from disagg_lib.checkpoint.hub import HubError
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.errors import ModelError
from disagg_lib.experiment.loading import load_experiment


def visible(contents):
    return {name: content for name, content in contents.items() if not name.startswith(".")}


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def part_sizes(tmp_path):
    sizes = []
    for path in (tmp_path / "model/.cache/huggingface/download").glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # whole, and moved to its place just now
            sizes.append(path.stat().st_size)
    return sizes


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


def test_a_connection_cut_in_the_middle_goes_on_with_no_byte_twice(
    fetch, hub, contents, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    faults = (1_000_001, 500_000)
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", cut_after=count) for count in faults]
    fetch()
    firsts = [s.first_byte for s in hub.seen if s.method == "GET" and "/cdn/" in s.path and SHARD in s.path]
    assert firsts == [0, 1_000_000, 1_500_000]
    assert (tmp_path / "model" / SHARD).read_bytes() == contents[SHARD]


def test_what_came_whole_before_a_process_was_killed_is_not_fetched_again(
    fetch, hub, child, contents, tmp_path
):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=500_000)]
    process = child(tmp_path / "model")
    wait_until(lambda: part_sizes(tmp_path) and (tmp_path / "model/tokenizer.json").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, there = len(hub.seen), set(read(tmp_path / "model"))
    fetch()
    again = {s.path.split("?")[0].rsplit("/", 1)[1] for s in hub.seen[before:]}
    assert SHARD in again and not again & there
    assert read(tmp_path / "model") == visible(contents) and not part_sizes(tmp_path)


def test_an_interrupt_ends_a_download_at_once(hub, child, tmp_path):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", bytes_per_s=100_000)]
    process = child(tmp_path / "model")
    wait_until(lambda: part_sizes(tmp_path))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=15)  # the rest would take 30 s
    assert said.rstrip().endswith("KeyboardInterrupt") and not part_sizes(tmp_path)


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


def test_a_byte_flipped_on_the_way_is_found_named_and_fetched_again(fetch, hub, contents, tmp_path, capsys):
    hub.faults = [Fault(rf"/cdn/.*{SHARD}", flip=1234)]
    fetch()
    assert f"{SHARD}: SHA-256 " in capsys.readouterr().out
    assert (tmp_path / "model" / SHARD).read_bytes() == contents[SHARD]


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_file_that_arrives_damaged_twice_ends_the_download(fetch, hub, tmp_path, name):
    hub.faults = [Fault(rf"/(cdn|resolve)/.*/{name}", times=9, flip=7)]
    with pytest.raises(HubError, match=f"damaged twice: {name}: SHA-256 "):
        fetch()
    assert not (tmp_path / "model" / name).exists()


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_byte_flipped_on_disk_is_found_named_and_fetched_again(fetch, hub, contents, tmp_path, name):
    fetch()
    path = tmp_path / "model" / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    (check,) = verify_digests(tmp_path / "model")
    assert not check.ok and check.found.startswith(f"{name}: SHA-256 ")
    before = len(hub.seen)
    fetch()
    assert read(tmp_path / "model") == visible(contents)
    assert {s.path.split("?")[0].rsplit("/", 1)[1] for s in hub.seen[before:]} == {name}
    assert verify_digests(tmp_path / "model")[0].ok


def test_a_file_that_is_gone_is_named_and_fetched(fetch, contents, tmp_path):
    fetch()
    (tmp_path / "model/tokenizer.json").unlink()
    assert verify_digests(tmp_path / "model")[0].found == "tokenizer.json: absent"
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
    assert len([s for s in hub.seen[before:] if s.method == "GET" and "/resolve/" in s.path]) == 1


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


def test_two_files_of_one_content_are_both_fetched(fetch, hub, contents, tmp_path):
    hub.repos[REPO] = {**hub.repos[REPO], "copy.safetensors": contents[SHARD], "d/e.bin": contents[SHARD]}
    fetch()
    for name in (SHARD, "copy.safetensors", "d/e.bin"):
        assert (tmp_path / "model" / name).read_bytes() == contents[SHARD]
    assert verify_digests(tmp_path / "model")[0].ok


def test_a_checkpoint_brought_by_hand_is_taken_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    e = load_experiment((), {"engine": "trtllm", "model_dir": str(tmp_path / "model")})
    with pytest.raises(HubError, match="no network"):
        download.obtain_checkpoint(e)
    quantization = make_rehearsal_checkpoint(tmp_path / "model") / "hf_quant_config.json"
    quantization.write_text(quantization.read_text().replace(synthetic.SYNTHETIC, "modelopt"))
    assert download.obtain_checkpoint(e) == tmp_path / "model"
    assert "compared with nothing" in capsys.readouterr().out
    checks = digests.checkpoint_checks(e)
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


def test_the_listing_says_what_the_hub_says(hub):
    commit, files = hub_listing(REPO, None, hub.endpoint)
    assert commit == hub.commits[REPO]
    assert files[SHARD].sha256 and not files["config.json"].sha256 and files["config.json"].git_sha1
