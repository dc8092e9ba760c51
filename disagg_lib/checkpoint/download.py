"""The checkpoint fetched from the hub by the hub's own library, at one commit, every file verified.

The layout is that of `nvidia/Llama-3.1-405B-Instruct-FP4`: config.json, hf_quant_config.json (ModelOpt NVFP4
with an FP8 KV cache), model.safetensors.index.json, shards, tokenizer.json. Beside the folder stands
`<folder>.manifest.json` with the repository, its commit and every file's digest: runs cite it.

A token comes from the environment or the hub library's own store, never through a parameter.
"""

import contextlib
import glob
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.utils import WeakFileLock

from ..errors import ModelError
from ..experiment.parameters import Experiment
from .digests import HubFile, Manifest, stoppable_bar
from .hub import HubError, asking, disk_full, file_system
from .synthetic import is_synthetic, make_rehearsal_checkpoint


def hub_listing(repo: str, revision: str | None, endpoint: str | None) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision (None: the main branch) stands for now, and its files by name."""
    api, files = huggingface_hub.HfApi(endpoint=endpoint, library_name="disagg_lib"), {}
    with asking(f"{repo} at {api.endpoint}"):
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=60)
        for f in info.siblings:
            name, path = f.rfilename, PurePosixPath(f.rfilename)
            if path.is_absolute() or ".." in path.parts:
                raise ModelError(f"{repo} lists {name!r}, outside its folder. Do not use this repository")
            if not name.startswith("."):
                sha256, git_sha1 = (f.lfs.sha256, None) if f.lfs else (None, f.blob_id)
                files[name] = HubFile(f.size, sha256, git_sha1)
    return info.sha, files


@contextlib.contextmanager
def _locked(folder: Path):
    """Our lock for the whole folder: the library's own, one a file, makes a second download wait, then fetch again."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=0.5))
        except TimeoutError:
            found = f"another download is writing it (it holds {lock.name})"
            raise HubError("locked", folder, found) from None
        yield


def download_checkpoint(
    folder: Path,
    repo: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    workers: int = 8,
    margin_bytes: int = 5_000_000_000,
) -> str:
    """Make the folder hold the repository's files at one commit; returns that commit.

    Files that came whole are kept from one call to the next; each is hashed before the manifest calls the folder
    complete. Without a revision the branch's commit is looked up once and kept in the manifest: later calls stay
    with it, and a complete folder needs no network.

    Parameters
    ----------
    workers : files that are fetched at a time.
    margin_bytes : room to be left on the file system.

    Raises
    ------
    HubError : its `kind` says what: gated, no token, no network, disk full, locked, ...
    """
    with file_system(folder), _locked(folder):
        manifest = Manifest(folder)
        ours = manifest.repo == repo
        if not ours or revision not in (None, manifest.revision):
            manifest.revision, manifest.expected = hub_listing(repo, revision, endpoint)
            manifest.repo, manifest.files = repo, {}
        bad = manifest.hash_files(manifest.expected)
        if bad and not ours:
            raise HubError("foreign files", folder, f"not fetched by this: {manifest.difference(bad[0])}")
        folder.mkdir(exist_ok=True)
        manifest.save()
        for _ in range(2):
            _remove(manifest, bad)
            if wanted := manifest.absent():
                _fetch(manifest, wanted, endpoint, workers, margin_bytes)
            bad = manifest.hash_files(wanted)
        if bad:
            found = manifest.difference(bad[0])
            _remove(manifest, bad)
            raise HubError("damaged twice", folder, found)
        if absent := manifest.absent():
            raise HubError("hub error", folder, f"{absent[0]} did not come")
        manifest.save(complete=True)
    return manifest.revision


def _remove(manifest: Manifest, bad: Sequence[str]) -> None:
    """Damaged files go, with a word why: the library takes a file that is there for the hub's."""
    for name in bad:
        print(f"{manifest.difference(name)}: removed")
        (manifest.folder / name).unlink()


def _fetch(
    manifest: Manifest, names: Sequence[str], endpoint: str | None, workers: int, margin_bytes: int
) -> None:
    """Fetch the named files with the hub's library, in a thread of its own: an interrupt must not wait for it."""
    folder, repo = manifest.folder, manifest.repo
    for leftover in (folder / ".cache/huggingface").rglob("*.incomplete"):  # of a process that was killed
        leftover.unlink()
    needed = sum(manifest.expected[name].size for name in names) + margin_bytes
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder, needed)
    wanted = {"revision": manifest.revision, "allow_patterns": [glob.escape(name) for name in names]}
    how = {"endpoint": endpoint, "max_workers": workers, "library_name": "disagg_lib"}
    where = f"{repo} at {endpoint or huggingface_hub.constants.ENDPOINT}"
    with asking(where), ThreadPoolExecutor(1) as thread, stoppable_bar() as bar:
        fetch = huggingface_hub.snapshot_download
        thread.submit(fetch, repo, local_dir=folder, tqdm_class=bar, **wanted, **how).result()


def origin(e: Experiment) -> str:
    """Where the experiment's checkpoint comes from, in words."""
    if e.engine == "trtllm":
        return f"{e.hf_repo} at {e.hf_revision or 'the main branch, looked up once and then kept'}"
    return {"rehearsal": "a synthetic checkpoint of two layers", "external": "the endpoint's own"}[e.engine]


def obtain_checkpoint(e: Experiment) -> Path:
    """Make the experiment's checkpoint be there: download it, or write a rehearsal's; returns its folder."""
    folder = Path(e.model_path)
    if e.engine == "trtllm":
        if is_synthetic(folder):  # the two have one place below scratch_dir
            found = "found a rehearsal's synthetic checkpoint"
            raise ModelError(f"{folder}: {found}. Set scratch_dir (or model_dir) to another folder")
        try:
            download_checkpoint(folder, e.hf_repo, e.hf_revision)
        except HubError as error:
            by_hand = (folder / "model.safetensors.index.json").is_file() and not Manifest(folder).repo
            if error.kind not in ("no network", "offline", "proxy") or not by_hand:
                raise
            print(f"{error}\n{folder} is taken as it is: its digests are recorded, but compared with nothing")
    elif e.engine == "rehearsal":
        with file_system(folder):
            make_rehearsal_checkpoint(folder)
    return folder
