"""Digests: verified, kept in the manifest, cited by runs."""

import json
import os

import pytest
from hub_server import REPO

from disagg_lib.checkpoint import digests
from disagg_lib.checkpoint.digests import cite_model, manifest_path, verify_digests
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.errors import ModelError


def test_a_manifest_that_is_none_says_what_to_do(tmp_path):
    for text in ("{", '{"expected": {"a": {"bytes": 1}}}'):
        manifest_path(tmp_path / "model").write_text(text)
        with pytest.raises(ModelError, match="Move it away and run 01_model_download again"):
            cite_model(tmp_path / "model")


def test_the_manifest_is_what_runs_cite(fetch, hub, tmp_path):
    folder = tmp_path / "model"
    assert cite_model(folder) is None
    fetch()
    cited = cite_model(folder)
    assert (cited["repo"], cited["revision"], len(cited["digest"])) == (REPO, hub.commits[REPO], 64)
    os.utime(folder / "config.json")
    with pytest.raises(ModelError, match="config.json has changed since it was verified"):
        cite_model(folder)
    verify_digests(folder)
    assert cite_model(folder)["digest"] == cited["digest"]


def test_a_verification_reads_only_what_changed(fetch, tmp_path, monkeypatch):
    fetch()
    os.utime(tmp_path / "model/config.json")
    hashed = []
    monkeypatch.setattr(
        digests,
        "hash_file",
        lambda path, add, real=digests.hash_file: hashed.append(path.name) or real(path, add),
    )
    verify_digests(tmp_path / "model")
    assert hashed == ["config.json"]


def test_a_verification_that_was_interrupted_goes_on(fetch, tmp_path, monkeypatch):
    fetch()
    manifest = json.loads(manifest_path(tmp_path / "model").read_text())
    manifest_path(tmp_path / "model").write_text(json.dumps(manifest | {"files": {}}))
    hashed, real = [], digests.hash_file

    def interrupted(path, add):
        if path.name == "config.json":  # one of the last: the largest come first
            raise KeyboardInterrupt
        return real(path, add)

    monkeypatch.setattr(digests, "hash_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify_digests(tmp_path / "model")
    kept = json.loads(manifest_path(tmp_path / "model").read_text())["files"]
    assert 0 < len(kept) < len(manifest["files"])
    monkeypatch.setattr(digests, "hash_file", lambda path, add: hashed.append(path.name) or real(path, add))
    verify_digests(tmp_path / "model")
    assert sorted(hashed) == sorted(set(manifest["files"]) - set(kept))


def test_a_synthetic_checkpoint_gets_a_manifest_that_says_it_is_from_no_hub(tmp_path):
    folder = make_rehearsal_checkpoint(tmp_path / "model")
    (check,) = verify_digests(folder)
    assert check.ok and "not from a hub" in check.found
    assert cite_model(folder)["repo"] is None


def test_a_shard_that_is_not_the_hubs_is_named(fetch, tmp_path):
    fetch()
    (tmp_path / "model/model-00003-of-00003.safetensors").write_bytes(b"")
    (check,) = verify_digests(tmp_path / "model")
    assert not check.ok and check.found == "model-00003-of-00003.safetensors: not one of the hub's"
