"""The checkpoint: download, digests, verification; and a small synthetic one for rehearsals.

The layout is that of `nvidia/Llama-3.1-405B-Instruct-FP4`: config.json, hf_quant_config.json (ModelOpt NVFP4
with an FP8 KV cache), model.safetensors.index.json, shards, tokenizer.json. Beside the folder stands
`<folder>.manifest.json` with the repository, its commit and every file's digest: runs cite it.

A token comes from the environment or the hub library's own store, never through a parameter.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import filelock
import httpx2
import huggingface_hub
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from ..errors import ModelError
from ..experiment.parameters import Experiment
from .digests import HubFile, Manifest, Progress, Report, hash_file, print_progress, size_of
from .hub import (
    HUB_FAULTS,
    NO_HUBS_ANSWER,
    PASSING,
    HubError,
    disk_full,
    file_system,
    named,
    redact,
    status_of,
)
from .synthetic import SYNTHETIC, make_rehearsal_checkpoint

MAX_PATIENCE_S = 300  # the longest wait that the hub may ask for


def _pause_s(error: Exception, failures: int) -> float | None:
    """Seconds to wait before the next try; None: another try is of no use."""
    status = status_of(error)
    if failures > 5 or not (isinstance(error, PASSING) or status in (408, 416, 429, 500, 502, 503, 504)):
        return None
    asked = error.response.headers.get("Retry-After", "") if status else ""
    wait_s = float(asked) if asked.isdigit() else 2.0 ** (failures - 1)
    return wait_s if wait_s <= MAX_PATIENCE_S else None


def hub_listing(
    repo: str, revision: str | None = None, endpoint: str | None = None
) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision (None: the main branch) stands for now, and its files by name."""
    api = huggingface_hub.HfApi(endpoint=endpoint, library_name="disagg_lib")
    for failures in range(1, 7):
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=60)
            break
        except (*HUB_FAULTS, *NO_HUBS_ANSWER) as error:
            wait_s = _pause_s(error, failures)
            if wait_s is None or isinstance(error, httpx2.ConnectError):
                raise named(error, f"{repo} at {api.endpoint}") from None
        time.sleep(wait_s)
    files = {}
    for f in info.siblings:
        path = PurePosixPath(f.rfilename)
        if path.is_absolute() or ".." in path.parts:
            raise ModelError(f"{repo} lists {f.rfilename!r}, outside its folder. Do not use this repository")
        if not f.rfilename.startswith("."):
            sha256, git_sha1 = (f.lfs.sha256, None) if f.lfs else (None, f.blob_id)
            files[f.rfilename] = HubFile(f.size, sha256, git_sha1)
    return info.sha, files


@contextlib.contextmanager
def _locked(folder: Path):
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(lock, timeout=0.5):
            yield
    except filelock.Timeout:
        raise HubError("locked", folder, f"another download is writing it (it holds {lock.name})") from None


def download_checkpoint(
    folder: Path,
    repo: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    workers: int = 8,
    margin_bytes: int = 5_000_000_000,
    report: Report | None = None,
) -> str:
    """Make the folder hold the repository's files at one commit; returns that commit.

    Goes on where an earlier one ended, to the byte; a file gets its name after its digest was found right.
    Without a revision the branch's commit is looked up once and kept in the manifest: later calls stay with
    it, and a complete folder needs no network.

    Parameters
    ----------
    workers : files that are fetched at a time.
    margin_bytes : room to be left on the file system.

    Raises
    ------
    HubError : its `kind` says what: gated, no token, no network, disk full, locked, ...
    """
    report = report or print_progress()
    with file_system(folder), _locked(folder):
        manifest = Manifest(folder)
        ours = manifest.repo == repo
        if not ours or revision not in (None, manifest.revision):
            manifest.revision, manifest.expected = hub_listing(repo, revision, endpoint)
            manifest.repo, manifest.files = repo, {}
        bad = manifest.hash_files(manifest.expected, report)
        if bad and not ours:
            raise HubError("foreign files", folder, f"not fetched by this: {manifest.difference(bad[0])}")
        folder.mkdir(exist_ok=True)
        manifest.save()
        absent = [name for name in manifest.expected if not (folder / name).is_file()]
        if bad or absent:
            _Fetch(manifest, endpoint, report).run(bad, absent, workers, margin_bytes)
        manifest.save(complete=True)
    return manifest.revision


class _Fetch:
    """Fetches files into `.<folder>.parts`, each named by its digest and name, and from there to its place."""

    def __init__(self, manifest: Manifest, endpoint: str | None, report: Report):
        self.manifest, self.report = manifest, report
        self.endpoint = endpoint or huggingface_hub.constants.ENDPOINT
        self.parts = manifest.folder.with_name(f".{manifest.folder.name}.parts")

    def part(self, name: str) -> Path:
        file = self.manifest.expected[name]
        return self.parts / f"{file.sha256 or file.git_sha1}-{name.replace('/', '-')}"

    def run(self, bad: Sequence[str], absent: Sequence[str], workers: int, margin_bytes: int) -> None:
        # Small files first: a wrong config.json shows before 230 GB have come.
        sizes = {name: self.manifest.expected[name].size for name in (*bad, *absent)}
        there = sum(min(size, size_of(self.part(name))) for name, size in sizes.items())
        self.parts.mkdir(exist_ok=True)
        needed = sum(sizes.values()) - there + margin_bytes
        if shutil.disk_usage(self.parts).free < needed:
            raise disk_full(self.manifest.folder, needed)
        self.progress = Progress("download", len(sizes), sum(sizes.values()), self.report)
        self.progress.add(there)
        for name in bad:
            self.progress.say(f"{self.manifest.difference(name)}: fetched again")
        try:
            self.progress.run(self.one, sorted(sizes, key=sizes.get), workers)
        finally:
            self.manifest.save()
        shutil.rmtree(self.parts)

    def one(self, name: str) -> None:
        part, target, file = self.part(name), self.manifest.folder / name, self.manifest.expected[name]
        for again in (False, True):
            self.rest(name, part, file.size)
            sums = hash_file(part, lambda _: self.progress.add(0), git=not file.sha256)
            if file.fits(*sums):
                break
            if again:
                raise HubError(
                    "damaged twice", name, f"SHA-256 {sums[0]}, the hub has {file.sha256 or file.git_sha1}"
                )
            self.progress.say(f"{name}: arrived damaged (SHA-256 {sums[0][:12]}): fetched again")
            self.progress.add(-size_of(part))
            part.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        self.manifest.record(name, sums[0], ok=True)
        self.progress.add(0, files=1)

    def rest(self, name: str, part: Path, size: int) -> None:
        """Fetch what a file lacks; passing faults are waited out, without end as long as bytes keep coming."""
        failures = 0
        while not part.exists() or size_of(part) != size:
            before = size_of(part)
            try:
                with file_system(part, lambda: size - size_of(part)):
                    self.stream(name, part, size)
            except HUB_FAULTS as error:
                failures = 1 if size_of(part) > before else failures + 1
                wait_s = _pause_s(error, failures)
                if wait_s is None:
                    raise named(error, f"{self.manifest.repo} at {self.endpoint}: {name}") from None
                self.progress.say(f"{name}: {redact(error)}: going on in {wait_s:.0f} s")
                self.progress.stop.wait(wait_s)

    def stream(self, name: str, part: Path, size: int) -> None:
        """One request for the rest of a file. (The hub library's own download begins anew in a new process.)"""
        repo, revision = self.manifest.repo, self.manifest.revision
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision, endpoint=self.endpoint)
        at = size_of(part)
        headers = build_hf_headers(library_name="disagg_lib") | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={at}-"} if at else {}
        timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            part.open("ab") as out,
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            if at and response.status_code in (200, 416):
                # The server does not do ranges, or the part is longer than the file: begin anew.
                out.truncate(0)
                self.progress.add(-at)
            hf_raise_for_status(response)
            for chunk in response.iter_raw():
                out.write(chunk)
                self.progress.add(len(chunk))
        if size_of(part) > size:
            self.progress.add(-size_of(part))
            part.unlink()
        if size_of(part) != size:
            raise httpx2.RemoteProtocolError(f"the answer ended elsewhere than at {size} bytes")


def origin(e: Experiment) -> str:
    """Where the experiment's checkpoint comes from, in words."""
    if e.engine == "trtllm":
        return f"{e.hf_repo} at {e.hf_revision or 'the main branch, looked up once and then kept'}"
    return {"rehearsal": "a synthetic checkpoint of two layers", "external": "the endpoint's own"}[e.engine]


def obtain_checkpoint(e: Experiment, report: Report | None = None) -> Path:
    """Make the experiment's checkpoint be there: download it, or write a rehearsal's; returns its folder."""
    folder = Path(e.model_path)
    quantization = folder / "hf_quant_config.json"
    if e.engine != "external" and quantization.is_file():  # the two have one place below scratch_dir
        synthetic = SYNTHETIC in quantization.read_text(errors="replace")
        if synthetic != (e.engine == "rehearsal"):
            found = (
                "a rehearsal's synthetic checkpoint" if synthetic else "a checkpoint that is no rehearsal's"
            )
            raise ModelError(f"{folder}: found {found}. Set scratch_dir (or model_dir) to another folder")
    if e.engine == "rehearsal":
        with file_system(folder):
            make_rehearsal_checkpoint(folder)
    elif e.engine == "trtllm":
        try:
            download_checkpoint(folder, e.hf_repo, e.hf_revision, report=report)
        except HubError as error:
            by_hand = (folder / "model.safetensors.index.json").is_file() and not Manifest(folder).repo
            if error.kind not in ("no network", "offline", "proxy") or not by_hand:
                raise
            print(f"{error}\n{folder} is taken as it is: its digests are recorded, but compared with nothing")
    return folder
