"""What all tests share: experiments and run folders below a fixed root, and a folder with an awkward name."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run import folder

PROJECT = Path("/project")  # golden files must not depend on where the repository lies


@pytest.fixture
def experiment():
    """experiment(**given): defaults plus these values, with paths below /project."""
    return lambda *params_files, **given: load_experiment(params_files, given, root=PROJECT)


@pytest.fixture
def odd_dir(tmp_path):
    """A folder whose name holds spaces, quotes, a semicolon, a dollar sign and a command."""
    path = tmp_path / "odd 'name'; \"x\" $(touch owned) & more"
    path.mkdir()
    return path


@pytest.fixture
def site_files(tmp_path):
    """Site values whose image, mounts, model, tokenizer, data set and TensorRT-LLM tree are there, each as small as it may be."""
    (tmp_path / "image.sqsh").write_bytes(b"hsqs")
    (tmp_path / "tree/.llm_aarch64/lib/python3.12/site-packages/tensorrt_llm").mkdir(parents=True)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 126}')
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(model / "tokenizer.json"))
    rows = {"tok_input": [[0, 1]] * 8313, "gt_output": ["a"] * 8313, "metric": ["rouge"] * 8313}
    pd.DataFrame(rows).to_pickle(tmp_path / "data.pkl")
    return {
        "dataset_path": str(tmp_path / "data.pkl"),
        "trust_dataset": True,
        "container_image": str(tmp_path / "image.sqsh"),
        "container_mounts": f"{tmp_path}:/scratch,{tmp_path}/tree:/work",
        "work_dir": "/work",
        "model_dir": str(model),
    }


@pytest.fixture
def results_dir(tmp_path, monkeypatch):
    """An empty results folder in place of the repository's."""
    path = tmp_path / "results"
    monkeypatch.setattr(folder, "RESULTS", path)
    return path


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """(server's SSL context, certificate's path): a certificate for 127.0.0.1 that nobody trusts yet."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes a certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", *words.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate
