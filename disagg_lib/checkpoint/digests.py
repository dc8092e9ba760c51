"""The checkpoint: download, digests, verification; and a small synthetic one for rehearsals.

The layout is that of `nvidia/Llama-3.1-405B-Instruct-FP4`: config.json, hf_quant_config.json (ModelOpt NVFP4
with an FP8 KV cache), model.safetensors.index.json, shards, tokenizer.json. Beside the folder stands
`<folder>.manifest.json` with the repository, its commit and every file's digest: runs cite it.

A token comes from the environment or the hub library's own store, never through a parameter.
"""

import collections
import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import filelock
import httpx2
import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status
from tokenizers import Tokenizer, models, pre_tokenizers

from .errors import DisaggError
from .experiment import Experiment
from .preflight import Check
from .run_folder import existing_parent
from .serving.lengths import MAX_INPUT_TOKENS, SAMPLE_COUNT


class ModelError(DisaggError):
    """The checkpoint is absent, damaged or another one than the experiment assumes."""


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a read token"
FIXES = {
    "gated": f"Open the repository's page on the hub, accept its terms, wait for the approval. {LOG_IN} of that account",
    "no token": f"It is private or does not exist. Check hf_repo. {LOG_IN} of an account that may see it",
    "token refused": f"It is expired or revoked. {LOG_IN}",
    "forbidden": "The token may not read this repository: make one with read access to it",
    "missing repository": f"Check hf_repo; a private one needs a token. {LOG_IN}",
    "missing revision": "Set hf_revision to a commit of this repository, or leave it out",
    "too many requests": f"Try again later; a token raises the limit. {LOG_IN}",
    "proxy": "Check HTTPS_PROXY, NO_PROXY and HF_ENDPOINT, or run this where no proxy is needed",
    "offline": "Unset HF_HUB_OFFLINE, or copy the checkpoint and its manifest here",
    "no network": "Run this where there is network (a login or transfer node); behind a proxy set HTTPS_PROXY; "
    "for a mirror set HF_ENDPOINT, for a certificate of your site's SSL_CERT_FILE",
    "hub error": "Try again later: what has come is kept",
    "disk full": "Free some, or set scratch_dir (or model_dir) to a larger file system: what has come is kept",
    "file system": "Set scratch_dir (or model_dir) to a folder that you may write; for someone else's checkpoint make one "
    "with links to its files (cp -rs)",
    "locked": "Wait for it, then run this again: a complete folder is found as it is",
    "damaged twice": "A proxy may change files on the way: try without it",
    "foreign files": "Set model_dir to another folder, or hf_revision to the commit that is there, or remove the files",
}


class HubError(ModelError):
    """The hub, the way to it or the place for it does not do; `kind` is a key of FIXES."""

    def __init__(self, kind: str, where: object, found: str):
        super().__init__(f"{where}: {kind}: {found}. {FIXES[kind]}")
        self.kind = kind


# -- structure

BYTES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1}  # of one element
# What config.json and hf_quant_config.json must say.
ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}
QUANTISATION = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
SYNTHETIC = "disagg_lib rehearsal"  # producer, in a rehearsal's hf_quant_config.json
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("intermediate_size", "vocab_size")
LLAMA_405B = dict(zip(SIZES, (126, 16384, 128, 8, 53248, 128256), strict=True))
REHEARSAL = dict(zip(SIZES, (2, 64, 4, 2, 128, 256), strict=True))


def _tensors(sizes: dict[str, int]):
    """(name, safetensors dtype, shape) of every tensor, as ModelOpt writes NVFP4: two values a byte, one scale per 16."""
    layers, hidden, heads, kv_heads, feed_forward, vocabulary = sizes.values()
    keys = kv_heads * hidden // heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    yield "model.embed_tokens.weight", "bfloat16", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in matrices.items():
            yield f"{prefix}{name}.weight", "uint8", (rows, columns // 2)
            yield f"{prefix}{name}.weight_scale", "float8_e4m3fn", (rows, columns // 16)
            yield f"{prefix}{name}.weight_scale_2", "float32", ()
            yield f"{prefix}{name}.input_scale", "float32", ()
        yield f"{prefix}self_attn.k_proj.k_scale", "float32", ()
        yield f"{prefix}self_attn.v_proj.v_scale", "float32", ()
        yield f"{prefix}input_layernorm.weight", "bfloat16", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", "bfloat16", (hidden,)
    yield "model.norm.weight", "bfloat16", (hidden,)
    yield "lm_head.weight", "bfloat16", (vocabulary, hidden)


def _write_zeros(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Write a shard; returns the bytes of its tensors."""
    lengths = {name: BYTES[dtype] * math.prod(shape) for name, dtype, shape in tensors}
    zeros = np.zeros(max(lengths.values()), np.uint8)
    specs = {}
    for name, dtype, shape in tensors:
        place = {"data_ptr": zeros.ctypes.data, "data_len": lengths[name]}
        specs[name] = safetensors.TensorSpec(dtype=dtype, shape=list(shape), **place)
    path.write_bytes(safetensors.serialize(specs, {"format": "pt"}))
    return sum(lengths.values())


def make_rehearsal_checkpoint(folder: Path) -> Path:
    """Write a valid two-layer checkpoint of zeros (about 200 kB) unless the folder is there already.

    It has the real one's file and tensor names, so `verify_checkpoint` reads both alike.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        tensors, weight_map, total = list(_tensors(REHEARSAL)), {}, 0
        middle = len(tensors) // 2
        for number, part in enumerate((tensors[:middle], tensors[middle:]), start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            total += _write_zeros(draft / name, part)
            weight_map |= dict.fromkeys((tensor for tensor, _, _ in part), name)
        quantization = {"quantization": QUANTISATION | {"group_size": 16}}
        for name, value in {
            "config.json": ARCHITECTURE | REHEARSAL | {"max_position_embeddings": 131072},
            "hf_quant_config.json": {"producer": {"name": SYNTHETIC}} | quantization,
            "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        }.items():
            (draft / name).write_text(json.dumps(value, indent=1) + "\n")
        vocabulary = {bytes([i]).decode("latin-1"): i for i in range(REHEARSAL["vocab_size"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(draft / "tokenizer.json"))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # then another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _read_json(path: Path, fix: str = "Download this file again") -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: not there. Needed: a complete checkpoint; run 01_model_download") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found a {type(value).__name__}, needed a mapping. {fix}")
    return value


def _shard_rows(folder: Path) -> list[tuple]:
    weight_map = _read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    damaged, held = [], set()
    for name in sorted(set(shards).difference(absent)):
        try:
            with safetensors.safe_open(folder / name, framework="numpy") as file:
                held |= set(file.keys())
        except safetensors.SafetensorError as error:
            damaged.append(f"{name}: {error}")
    lost = sorted(set(weight_map) - held)

    def complete(requirement: str, wanted: Collection, lacking: list[str], fix: str) -> tuple:
        found = f"{len(wanted) - len(lacking)} of {len(wanted)}"
        return requirement, "; absent: ".join([found, *lacking[:1]]), bool(wanted) and not lacking, fix

    fetch, anew = "run 01_model_download again: it fetches what is absent", "run 01_model_download again"
    header = damaged[0] if damaged else f"{len(shards) - len(absent)} shards read"
    mixed = "index and shards are of different revisions: download one revision whole"
    return [
        complete("every shard of the index is there", shards, absent, fetch),
        ("safetensors headers and sizes agree", header, not damaged, f"delete the named shard and {anew}"),
        complete("every tensor of the index is in its shard", weight_map, lost, mixed),
    ]


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        fix = "run 01_model_download, or set model_dir"
        raise ModelError(f"{folder}: not there. Needed: the checkpoint; {fix}")


def verify_checkpoint(folder: Path, sizes: dict[str, int], max_seq_len: int) -> list[Check]:
    """Whether the folder is the checkpoint that the experiment assumes; one row a requirement.

    Raises
    ------
    ModelError : the folder, config.json or the index is absent or unreadable.
    """
    _require_folder(folder)
    config = _read_json(folder / "config.json")
    quantization = _read_json(folder / "hf_quant_config.json").get("quantization", {})
    rows, fix = _shard_rows(folder), "this is another model: set model_dir or hf_repo"
    for needed, said in ((ARCHITECTURE | sizes, config), (QUANTISATION, quantization)):
        for key, value in needed.items():
            rows.append((f"{key}: {value}", str(said.get(key)), said.get(key) == value, fix))
    enough = f"context length of at least {max_seq_len} tokens"
    length = config.get("max_position_embeddings", 0)
    rows.append((enough, str(length), length >= max_seq_len, "lower max_seq_len"))
    try:
        found, ok = f"{Tokenizer.from_file(str(folder / 'tokenizer.json')).get_vocab_size()} tokens", True
    except Exception as error:  # the tokenizers library raises bare Exception
        found, ok = str(error), False
    rows.append(("the tokenizer loads", found, ok, "download tokenizer.json again"))
    return [Check(*row) for row in rows]


# -- digests


@dataclass(frozen=True)
class HubFile:
    """One file as the hub describes it: large ones by SHA-256, small ones by git's SHA-1 of the blob."""

    size: int  # bytes
    sha256: str | None
    git_sha1: str | None

    def fits(self, sha256: str, git_sha1: str | None) -> bool:
        return sha256 == self.sha256 if self.sha256 else git_sha1 == self.git_sha1


class _Stopped(Exception):
    """Another thread failed, or the user interrupted: this one ends."""


class Progress:
    """How far a download or a verification has come; `note` says what just happened, else it is empty."""

    def __init__(self, what: str, files: int, bytes: int, report: "Report"):
        self.what, self.files, self.bytes, self.note = what, files, bytes, ""
        self.files_done = self.bytes_done = 0
        self._report, self._lock, self.stop = report, threading.RLock(), threading.Event()
        self._history = collections.deque([(time.monotonic(), 0)], maxlen=20)  # 10 s

    @property
    def bytes_per_s(self) -> float:
        (then, before), now = self._history[0], time.monotonic()
        return max(0.0, (self.bytes_done - before) / (now - then)) if now > then else 0.0

    @property
    def eta_s(self) -> float:
        return (self.bytes - self.bytes_done) / self.bytes_per_s if self.bytes_per_s else math.inf

    def __str__(self):
        eta = "?" if math.isinf(self.eta_s) else str(datetime.timedelta(seconds=round(self.eta_s)))
        return (
            f"{self.what}: {self.files_done}/{self.files} files, {self.bytes_done / 1e9:.2f}/{self.bytes / 1e9:.2f} GB, "
            f"{self.bytes_per_s / 1e6:.0f} MB/s, {eta} left"
        )

    def add(self, bytes: int, files: int = 0) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self.bytes_done += bytes
            self.files_done += files

    def say(self, note: str = "") -> None:
        with self._lock:
            self.note = note
            self._history.append((time.monotonic(), self.bytes_done))
            self._report(self)

    def run(self, work: Callable, items: Iterable, workers: int) -> None:
        """work(item) in threads, with a report twice a second; the first error ends all, as Ctrl-C does."""
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                self.say()
                while (state := wait(futures, 0.5, FIRST_EXCEPTION)).not_done:
                    self.say()
                    if any(future.exception() for future in state.done):
                        break
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        self.say()
        raised = [error for f in futures if not f.cancelled() and (error := f.exception())]
        for error in sorted(raised, key=lambda error: isinstance(error, _Stopped)):
            raise error


Report = Callable[[Progress], None]


def print_progress(every_s: float = 10.0) -> Report:
    """A report that prints: one line that renews itself on a terminal, a line every `every_s` elsewhere."""
    said_at = -math.inf

    def report(p: Progress) -> None:
        nonlocal said_at
        terminal, finished = sys.stdout.isatty(), p.files_done == p.files
        renew = "\r\x1b[K" if terminal else ""
        if p.note:
            print(renew + p.note)
        if terminal or finished or time.monotonic() - said_at >= every_s:
            print(f"{renew}{p}", end="" if terminal and not finished else "\n", flush=True)
            said_at = time.monotonic()

    return report


def _hash_file(path: Path, add: Callable[[int], None], git: bool) -> tuple[str, str | None]:
    """SHA-256 and, if asked for, git's SHA-1 of the blob. hashlib lets other threads run meanwhile."""
    sums = [hashlib.sha256()]
    if git:
        sums.append(hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            for each in sums:
                each.update(buffer[:count])
            add(count)
    return sums[0].hexdigest(), sums[1].hexdigest() if git else None


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a checkpoint's folder stands."""
    return folder.with_name(folder.name + ".manifest.json")


class _Manifest:
    """The manifest as it grows: with it a first verification can be resumed, and a second reads only what changed."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, manifest_path(folder)
        self.lock, self.saved_at = threading.Lock(), 0.0
        fix = "Move it away and run 01_model_download again"
        value = _read_json(self.path, fix) if self.path.exists() else {}
        self.repo, self.revision, self.digest = (value.get(key) for key in ("repo", "revision", "digest"))
        self.files: dict[str, dict] = value.get("files", {})
        try:
            self.expected = {name: HubFile(**file) for name, file in value.get("expected", {}).items()}
        except (AttributeError, TypeError):
            raise ModelError(f"{self.path}: not as this release writes it. {fix}") from None

    def unchanged(self, name: str) -> bool:
        """Whether the file has the size and time that it had when it was hashed."""
        path, entry = self.folder / name, self.files.get(name)
        return bool(entry) and path.exists() and _size_and_time(path) == (entry["size"], entry["mtime_ns"])

    def record(self, name: str, sha256: str, ok: bool) -> None:
        size, mtime_ns = _size_and_time(self.folder / name)
        with self.lock:
            self.files[name] = {"size": size, "mtime_ns": mtime_ns, "sha256": sha256, "ok": ok}
            if time.monotonic() - self.saved_at > 1.0:
                self.save()

    def save(self, complete: bool = False) -> None:
        lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(self.files.items()))
        self.digest = hashlib.sha256(lines.encode()).hexdigest() if complete else None
        value = {key: getattr(self, key) for key in ("repo", "revision", "digest")} | {
            "format": 1,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "expected": {name: asdict(file) for name, file in self.expected.items()},
            "files": dict(sorted(self.files.items())),
        }
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with _file_system(self.path):
            draft.write_text(json.dumps(value, indent=1) + "\n")
            draft.replace(self.path)
        self.saved_at = time.monotonic()

    def hash_files(self, names: Iterable[str], report: Report) -> list[str]:
        """Hash those of the files that are there and have changed; returns the names that differ from the hub's."""
        names = [name for name in names if (self.folder / name).is_file()]
        sizes = {name: (self.folder / name).stat().st_size for name in names if not self.unchanged(name)}

        def one(name: str) -> None:
            expected = self.expected.get(name)
            sums = _hash_file(self.folder / name, progress.add, bool(expected) and not expected.sha256)
            self.record(name, sums[0], expected is None or expected.fits(*sums))
            progress.add(0, files=1)

        if sizes:  # the largest first, so that all threads end together
            progress = Progress("verify", len(sizes), sum(sizes.values()), report)
            try:
                progress.run(one, sorted(sizes, key=sizes.get, reverse=True), _cores())
            finally:
                self.save()
        return [name for name in names if not self.files[name]["ok"]]

    def difference(self, name: str) -> str:
        """How a file differs from what the hub has."""
        expected, entry = self.expected[name], self.files.get(name)
        if not (self.folder / name).exists():
            return f"{name}: absent"
        if entry["size"] != expected.size:
            return f"{name}: {entry['size']} bytes, the hub has {expected.size}"
        hub = f"SHA-256 {expected.sha256[:12]}" if expected.sha256 else f"git SHA-1 {expected.git_sha1[:12]}"
        return f"{name}: SHA-256 {entry['sha256'][:12]}, the hub has {hub}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _cores() -> int:
    """SHA-256 is what limits, so one thread a core; 32 are enough for any file system."""
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def verify_digests(folder: Path, report: Report | None = None) -> list[Check]:
    """Hash every file, compare with the hub's metadata where the manifest has it, and write the manifest.

    A file whose size and time have not changed is not read again; a verification that was killed goes on.

    Raises
    ------
    ModelError : the folder is not there, or the manifest cannot be read or written.
    """
    _require_folder(folder)
    manifest = _Manifest(folder)
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    there = {str(PurePosixPath(p)) for p in paths if not any(part.startswith(".") for part in p.parts)}
    names = sorted(manifest.expected or there)
    bad = manifest.hash_files(names, report or print_progress())
    bad += [name for name in names if name not in there]
    strays = sorted(name for name in there.difference(names) if name.endswith(".safetensors"))
    manifest.files = {name: manifest.files[name] for name in names if name in there}
    whole = bool(names) and not bad and not strays
    manifest.save(complete=whole)
    size_gb = sum(entry["size"] for entry in manifest.files.values()) / 1e9
    requirement, source = "every file has the hub's digest", f"{manifest.repo} at {manifest.revision}"
    if not manifest.expected:
        requirement, source = "every file's digest is recorded", "not from a hub: nothing to compare with"
    wrong = [*map(manifest.difference, bad), *(f"{name}: not one of the hub's" for name in strays)]
    found = "; ".join(wrong) or f"{len(names)} files, {size_gb:.2f} GB ({source})"
    fix = "run 01_model_download again: it fetches the named files anew"
    fix += ". Move away what is not the hub's: servers load all shards" if strays else ""
    return [Check(requirement, found, whole, fix)]


def cite_model(folder: Path) -> dict | None:
    """What a run's manifest says of the checkpoint; None if it has no manifest yet. Reads no file's content.

    Raises
    ------
    ModelError : the checkpoint was not verified whole, or has changed since.
    """
    if not manifest_path(folder).exists():
        return None
    manifest = _Manifest(folder)
    changed = [name for name in manifest.files if not manifest.unchanged(name)]
    if changed or not manifest.digest:
        what = f"{changed[0]} has changed since it was verified" if changed else "not verified whole"
        raise ModelError(f"{folder}: {what}. Run 01_model_download again")
    cited = {"repo": manifest.repo, "revision": manifest.revision, "digest": manifest.digest}
    return {"manifest": str(manifest.path), **cited, "files": len(manifest.files)}


# -- download

MAX_PATIENCE_S = 300  # the longest wait that the hub may ask for
PASSING = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
HUB_FAULTS = (httpx2.HTTPError, hub_errors.OfflineModeIsEnabled, hub_errors.HFValidationError)
NO_HUBS_ANSWER = (
    ValueError,
    KeyError,
    TypeError,
)  # of the hub library, as it reads a portal's page for a hub's JSON


def _redact(said: object) -> str:
    """What an error or an address says, on one line, without tokens, signatures (the query of a URL) and passwords."""
    text = getattr(said, "server_message", None) or str(said) or type(said).__name__
    if token := huggingface_hub.get_token():
        text = text.replace(token, "***")
    text = re.sub(r"hf_\w+|(?<=://)[^/@\s]+(?=@)", "***", text)
    return " ".join(re.sub(r"\?\S*=\S*", "", text).split())[:300]


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _named(error: Exception, where: str) -> HubError:
    """The hub library's error as one of ours."""
    status = _status(error)
    if isinstance(error, hub_errors.GatedRepoError):
        kind = "gated"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        kind = "missing revision"
    elif status == 401:
        kind = "token refused" if huggingface_hub.get_token() else "no token"
    elif status == 404 or isinstance(error, hub_errors.HFValidationError):
        kind = "missing repository"
    elif status == 407 or isinstance(error, httpx2.ProxyError):
        kind = "proxy"
    elif isinstance(error, hub_errors.OfflineModeIsEnabled):
        kind = "offline"
    elif isinstance(error, UnicodeEncodeError):
        kind = "token refused"
    elif isinstance(error, NO_HUBS_ANSWER):
        what = f"no hub's answer ({type(error).__name__}: {_redact(error)})"
        return HubError("proxy", _redact(where), what)
    else:
        kind = {403: "forbidden", 429: "too many requests", None: "no network"}.get(status, "hub error")
    return HubError(kind, _redact(where), f"{status} {_redact(error)}" if status else _redact(error))


def _disk_full(folder: Path, needed: int) -> HubError:
    free = shutil.disk_usage(existing_parent(folder)).free
    return HubError("disk full", folder, f"found {free / 1e9:.2f} GB free, needed {needed / 1e9:.2f} GB more")


@contextlib.contextmanager
def _file_system(place: Path, needed: Callable[[], int] = lambda: 0):
    """What the file system says against it, as one of our errors."""
    try:
        yield
    except OSError as error:
        if isinstance(error, HUB_FAULTS):  # the hub library's offline mode is an OSError, too
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(place.parent, needed()) from None
        raise HubError("file system", place, str(error)) from None


def _pause_s(error: Exception, failures: int) -> float | None:
    """Seconds to wait before the next try; None: another try is of no use."""
    status = _status(error)
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
                raise _named(error, f"{repo} at {api.endpoint}") from None
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
    with _file_system(folder), _locked(folder):
        manifest = _Manifest(folder)
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

    def __init__(self, manifest: _Manifest, endpoint: str | None, report: Report):
        self.manifest, self.report = manifest, report
        self.endpoint = endpoint or huggingface_hub.constants.ENDPOINT
        self.parts = manifest.folder.with_name(f".{manifest.folder.name}.parts")

    def part(self, name: str) -> Path:
        file = self.manifest.expected[name]
        return self.parts / f"{file.sha256 or file.git_sha1}-{name.replace('/', '-')}"

    def run(self, bad: Sequence[str], absent: Sequence[str], workers: int, margin_bytes: int) -> None:
        # Small files first: a wrong config.json shows before 230 GB have come.
        sizes = {name: self.manifest.expected[name].size for name in (*bad, *absent)}
        there = sum(min(size, _size(self.part(name))) for name, size in sizes.items())
        self.parts.mkdir(exist_ok=True)
        needed = sum(sizes.values()) - there + margin_bytes
        if shutil.disk_usage(self.parts).free < needed:
            raise _disk_full(self.manifest.folder, needed)
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
            sums = _hash_file(part, lambda _: self.progress.add(0), git=not file.sha256)
            if file.fits(*sums):
                break
            if again:
                raise HubError(
                    "damaged twice", name, f"SHA-256 {sums[0]}, the hub has {file.sha256 or file.git_sha1}"
                )
            self.progress.say(f"{name}: arrived damaged (SHA-256 {sums[0][:12]}): fetched again")
            self.progress.add(-_size(part))
            part.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        self.manifest.record(name, sums[0], ok=True)
        self.progress.add(0, files=1)

    def rest(self, name: str, part: Path, size: int) -> None:
        """Fetch what a file lacks; passing faults are waited out, without end as long as bytes keep coming."""
        failures = 0
        while not part.exists() or _size(part) != size:
            before = _size(part)
            try:
                with _file_system(part, lambda: size - _size(part)):
                    self.stream(name, part, size)
            except HUB_FAULTS as error:
                failures = 1 if _size(part) > before else failures + 1
                wait_s = _pause_s(error, failures)
                if wait_s is None:
                    raise _named(error, f"{self.manifest.repo} at {self.endpoint}: {name}") from None
                self.progress.say(f"{name}: {_redact(error)}: going on in {wait_s:.0f} s")
                self.progress.stop.wait(wait_s)

    def stream(self, name: str, part: Path, size: int) -> None:
        """One request for the rest of a file. (The hub library's own download begins anew in a new process.)"""
        repo, revision = self.manifest.repo, self.manifest.revision
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision, endpoint=self.endpoint)
        at = _size(part)
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
        if _size(part) > size:
            self.progress.add(-_size(part))
            part.unlink()
        if _size(part) != size:
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
        with _file_system(folder):
            make_rehearsal_checkpoint(folder)
    elif e.engine == "trtllm":
        try:
            download_checkpoint(folder, e.hf_repo, e.hf_revision, report=report)
        except HubError as error:
            by_hand = (folder / "model.safetensors.index.json").is_file() and not _Manifest(folder).repo
            if error.kind not in ("no network", "offline", "proxy") or not by_hand:
                raise
            print(f"{error}\n{folder} is taken as it is: its digests are recorded, but compared with nothing")
    return folder


def checkpoint_checks(e: Experiment, report: Report | None = None) -> list[Check]:
    """Everything that the experiment assumes of its checkpoint: structure first, then every digest."""
    if e.engine == "external":
        return []
    folder, shape = Path(e.model_path), REHEARSAL if e.engine == "rehearsal" else LLAMA_405B
    return verify_checkpoint(folder, shape, e.max_seq_len) + verify_digests(folder, report)


# -- what else the harness and an accuracy run want below scratch_dir

HARNESS_REPO = "meta-llama/Llama-3.1-405B-Instruct"
HARNESS_REVISION = "be673f326cab4cd22ccfef76109faf68e41aa5f1"  # mlcommons/inference, language/llama3.1-405b
HARNESS_FILES = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer*")
DATA_SET = "mlperf_llama3.1_405b_dataset_8313_processed_fp16_eval.pkl"


def harness_model_folder(scratch_dir: str) -> Path:
    """The original model's folder, of which the harness wants config and tokenizer alone."""
    return Path(scratch_dir) / "models/Llama3.1-405B/Meta-Llama-3.1-405B-Instruct"


def _array_shape(path: Path) -> str:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        return f"no whole array ({error})"
    return f"{array.dtype} {' x '.join(map(str, array.shape))}"


def data_checks(scratch_dir: str, dataset_path: str | None = None, needed: bool = False) -> list[Check]:
    """The harness's second folder and the data set: what is there, its digest, and how to get it. Opens no pickle.

    Parameters
    ----------
    needed : whether the run fails without them (client: nvidia_harness); otherwise they are warnings.
    """
    second, data = harness_model_folder(scratch_dir), Path(scratch_dir) / "preprocessed_data/llama3.1-405b"
    get_model = (
        f"accept the terms of {HARNESS_REPO}, then hf download {HARNESS_REPO} --revision {HARNESS_REVISION} "
        f"--include {' '.join(map(repr, HARNESS_FILES))} --local-dir {shlex.quote(str(second))}"
    )
    get_pickle = (
        "MLCommons' r2-downloader with https://inference.mlcommons-storage.org/metadata/llama3-1-405b-dataset-8313.uri "
        "(README of mlcommons/inference, language/llama3.1-405b)"
    )
    get_arrays = (
        "in the harness's container: python3 code/llama3_1-405b/tensorrt/preprocess_data.py --data_dir build/data "
        "--preprocessed_data_dir build/preprocessed_data"
    )
    wanted = {second / name: (get_model, "") for name in ("config.json", "tokenizer.json")}
    wanted[Path(dataset_path) if dataset_path else data / DATA_SET] = get_pickle, ""
    wanted[data / "input_ids_padded.npy"] = get_arrays, f"int32 {SAMPLE_COUNT} x {MAX_INPUT_TOKENS}"
    wanted[data / "input_lens.npy"] = get_arrays, f"int32 {SAMPLE_COUNT}"
    checks = []
    for path, (fix, shape) in wanted.items():
        found, ok = "absent", path.is_file()
        if ok:
            found = f"SHA-256 {_hash_file(path, lambda count: None, git=False)[0]}, {path.stat().st_size / 1e6:.1f} MB"
            if shape:
                there = _array_shape(path)
                ok, found = there == shape, f"{there}, {found}"
        requirement = f"{path.parent.name}/{path.name}" + (f": {shape}" if shape else "")
        checks.append(Check(requirement, found, ok, fix, level="error" if needed else "warning"))
    return checks
