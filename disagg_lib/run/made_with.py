"""What 00 and 01 recorded of checkpoint, image and client environment, as a run's manifest cites it."""

import json
import re
from pathlib import Path

from ..checkpoint.digests import cite_model
from ..errors import ModelError
from ..experiment.parameters import Experiment
from ..files import REPOSITORY


def cite_image(e: Experiment) -> dict | None:
    """What a run's manifest says of the image: path and SHA-256; None for a registry's name, or if none is recorded.

    It stands, as sha256sum writes it, beside the image, or in scratch_dir where that is someone else's folder. One
    that is older than the image is another's.
    """
    image = Path(e.container_image or "")
    for record, name in ((Path(f"{image}.sha256"), image.name), (image_record(e), str(image))):
        if image.is_file() and record.is_file() and record.stat().st_mtime >= image.stat().st_mtime:
            digest, _, named = record.read_text(errors="replace").strip().partition("  ")
            if named == name and re.fullmatch("[0-9a-f]{64}", digest):
                return {"path": str(image), "sha256": digest}
    return None


def image_record(e: Experiment) -> Path:
    return Path(e.scratch_dir) / "setup" / f"{Path(e.container_image or '').name}.sha256"


def pinned_versions() -> dict[str, str]:
    """Package -> version that requirements.lock asks for."""
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = (line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    return {name: version for name, version in pins}


def cite_client(folder: str | Path) -> dict | None:
    """What a run's manifest says of the client's environment: path, versions, digest; None if 00_setup did not build it."""
    record = Path(folder) / "client_env.json"
    return json.loads(record.read_text()) if record.is_file() else None


def made_with(e: Experiment) -> dict:
    """Checkpoint, image and client environment as 00 and 01 recorded them; None where nothing is recorded."""
    try:
        checkpoint = cite_model(Path(e.model_path)) if e.servers else None
    except ModelError as error:
        checkpoint = {"problem": str(error)}
    return {
        "checkpoint": checkpoint,
        "container_image": cite_image(e) if e.container == "pyxis" else None,
        "client_env": cite_client(e.client_dir) if e.client_dir else None,
    }
