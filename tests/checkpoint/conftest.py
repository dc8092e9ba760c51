"""A hub on this machine that serves the synthetic checkpoint, and downloads from it."""

import contextlib
import os
import signal
import subprocess
import sys

import huggingface_hub
import pytest
from hub_server import REPO, SHARD, HubServer

from disagg_lib.checkpoint.download import download_checkpoint
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


@pytest.fixture(scope="session")
def contents(tmp_path_factory):
    """The synthetic checkpoint's files, with one shard of 3 MB."""
    folder = make_rehearsal_checkpoint(tmp_path_factory.mktemp("hub") / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {SHARD: bytes(range(256)) * 12000, ".gitattributes": b"*.safetensors filter=lfs\n"}


@pytest.fixture(name="hub")
def hub_on_this_machine(contents, monkeypatch, tmp_path_factory):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("hf_home")
    monkeypatch.setenv("HF_HOME", str(home))  # of other processes; this one has read it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    huggingface_hub.close_session()  # it reads the proxy's variables once
    with HubServer({REPO: dict(contents)}) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def fetch(hub, tmp_path):
    """fetch(**more): download into tmp_path/model."""

    def call(folder=tmp_path / "model", **more):
        return download_checkpoint(folder, REPO, endpoint=hub.endpoint, **{"margin_bytes": 0, **more})

    return call


CHILD = """
import sys
from pathlib import Path
import huggingface_hub
from disagg_lib.checkpoint.download import download_checkpoint
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000  # as many for 3 MB as its 10 MB are for real files
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
