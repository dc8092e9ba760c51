"""What the job left behind, by SHA-256: an edited file shows."""

import hashlib
import json


def write_digests(run):
    """Write RUN/job/digests.json: of LoadGen's files, what the client saw, and what the job was told."""
    patterns = (
        "experiment.yaml",
        "user.conf",
        "job/settings.json",
        "job/client_*.json",
        "mlperf/*/mlperf_log_*",
    )
    files = sorted(path for pattern in patterns for path in run.glob(pattern) if path.is_file())
    digests = {path.relative_to(run).as_posix(): _sha256(path) for path in files}
    (run / "job" / "digests.json").write_text(json.dumps({"sha256": digests}, indent=1) + "\n")


def _sha256(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()
