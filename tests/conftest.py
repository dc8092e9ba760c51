"""What all tests share: experiments and run folders below a fixed root, and a folder with an awkward name."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

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
