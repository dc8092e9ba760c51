"""What can be wrong with the hub, the way to it, or the place for its files: named, with what to do."""

import contextlib
import errno
import logging
import re
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..errors import ModelError
from ..files import existing_parent

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


def redact(said: object) -> str:
    """What an error or an address says, on one line, without tokens, signatures (the query of a URL) and passwords."""
    text = getattr(said, "server_message", None) or str(said) or type(said).__name__
    if token := huggingface_hub.get_token():
        text = text.replace(token, "***")
    text = re.sub(r"hf_\w+|(?<=://)[^/@\s]+(?=@)", "***", text)
    return " ".join(re.sub(r"\?\S*=\S*", "", text).split())[:300]


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


for handler in logging.getLogger("huggingface_hub").handlers:  # its warnings show addresses whole
    handler.addFilter(_redact_record)


# (errors, HTTP status, kind): the first that fits says what an error is.
_KINDS = (
    (hub_errors.GatedRepoError, -1, "gated"),
    (hub_errors.RevisionNotFoundError, -1, "missing revision"),
    ((), 401, "no token"),
    (hub_errors.HFValidationError, 404, "missing repository"),
    (httpx2.ProxyError, 407, "proxy"),
    (hub_errors.OfflineModeIsEnabled, -1, "offline"),
    (UnicodeEncodeError, -1, "token refused"),
    ((ValueError, KeyError, TypeError, hub_errors.FileMetadataError), -1, "no answer"),
    (httpx2.TransportError, -1, "no network"),
    ((), 403, "forbidden"),
    ((), 429, "too many requests"),
    (Exception, -1, "hub error"),
)


def _named(error: Exception, where: str) -> HubError:
    """The hub library's error as one of ours."""
    while isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # it says "not in the cache"; why it asked the cache is the cause
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = next(kind for types, code, kind in _KINDS if isinstance(error, types) or status == code)
    found = f"{status} {redact(error)}" if status else redact(error)
    if kind == "no answer":
        kind, found = "proxy", f"no hub's answer ({type(error).__name__}: {redact(error)})"
    elif kind == "no token" and huggingface_hub.get_token():
        kind = "token refused"
    return HubError(kind, redact(where), found)


def disk_full(folder: Path, needed: int | None = None) -> HubError:
    free = shutil.disk_usage(existing_parent(folder)).free
    more = f", needed {needed / 1e9:.2f} GB more" if needed else ""
    return HubError("disk full", folder, f"found {free / 1e9:.2f} GB free{more}")


@contextlib.contextmanager
def asking(where: str):
    """What the hub, the way to it or the hub library says against it, as one of our errors."""
    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if getattr(error, "errno", None):  # the file system's word
            raise
        raise _named(error, where) from None


@contextlib.contextmanager
def file_system(place: Path):
    """What the file system says against it, as one of our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(place.parent) from None
        raise HubError("file system", place, str(error)) from None
