"""What must not leave the site: user and host names, absolute paths, accounts, tokens. Found, replaced, listed, checked.

Names are collected from the whole run first, so that a host that one file declares is replaced in every file.
"""

from __future__ import annotations

import collections
import getpass
import html
import ipaddress
import json
import re
import shlex
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import SecretError
from ..experiment.parameters import Experiment, parameter_kind

#: parameters of experiment.yaml whose whole value is replaced wherever it stands
_PARAMETERS = {"account": "account", "partition": "partition", "reservation": "account"}
#: words that are values of such parameters on many clusters and words of these files too: replaced after their key alone
_COMMON = frozenset({
    *("root", "user", "users", "admin", "default", "general", "normal", "batch", "debug"),
    *("compute", "interactive", "standard", "context", "generation", "server", "gpu", "cpu", "main"),
    *("test", "tests", "data", "work", "home", "nobody", "none", "null", "true"),
    *("false", "local", "all", "nvidia", "mlperf", "node", "nodes", "host", "orchestrator"),
    *("localhost", "container", "name", "from", "value"),
    *["ok", "id", "ms", "ns", "us", "in", "is", "of", "to", "no", "or", "on", "at", "by", "it", "as", "an", "be", "do", "go", "if", "my", "so", "up", "tp", "pp", "gb", "kb", "mb", "io", "np", "pd", "py", "sh"],
})  # fmt: skip
_REGISTRIES = frozenset(
    {"nvcr.io", "nvcr", "docker.io", "docker", "ghcr.io", "ghcr", "quay.io", "quay"}
)  # everybody's
_OWN_HOSTS = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1", "nodes", "none", "null"})
#: what may stand before a name: no letter or digit, but in JSON a line break ends with a letter, and a colour with an m
_BEFORE = r"(?:(?<![A-Za-z0-9])|(?<=\\\\[ntr])|(?<=\[\dm)|(?<=\[\d\dm))"
_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"

#: kind -> pattern; group `name` is what is secret
_TOKENS = re.compile(
    r"(?P<name>\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|\bhf_[a-z]{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{12,}"
    r"|\bnvapi-[\w-]{12,}|\bsk-[\w-]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abeoprs]-[\w-]{8,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
)
#: a key that says secret, then its value; a number or a word such as null is no secret, nor is a shell variable
_ASSIGNED = (
    re.compile(
        r"(?i)(?:\b|_)(?:(?:access|auth|api|hf|hub|github|gitlab|bearer|secret)[_-]?(?:token|key)|token|password|passwd|secret"
        r"|credentials?|jwt|authorization)\\?[\"']?[ \t]*[:=][ \t]*\\?[\"']?(?:(?:bearer|basic)[ \t]+)?"
        r"(?P<name>[A-Za-z0-9][\w./+~-]{7,}=*)"
    ),
    re.compile(r"(?i)\bbearer\s+(?P<name>[A-Za-z0-9][\w./+~-]{7,}=*)"),
    re.compile(r"--(?:hf-|api-)?(?:token|key|password)[= ](?P<name>[\w./+~-]{8,})"),
    re.compile(r"://[^\s/:@\"']+:(?P<name>[^\s/@\"']+)@"),
)
_USERS = (
    re.compile(r"/(?:home|Users|nfs/home|mnt/home|lustre/home|scratch/users?)/(?P<name>[A-Za-z_][\w.-]*)"),
    re.compile(
        r"\b(?:SLURM_JOB_USER|SLURM_JOB_UID_NAME|LOGNAME|USER|USERNAME|UserId)\s*[=:]\s*[\"']?(?P<name>[A-Za-z_][\w.-]*)"
    ),
    re.compile(r"(?m)(?:^|[\s\"'=(])(?P<name>[a-z_][\w-]{1,31})@(?=[A-Za-z][\w.-]*(?:[:\s\"')]|$))"),
    re.compile(r"(?m)^\s*[\"']?user[\"']?\s*[:=]\s*[\"']?(?P<name>[A-Za-z_][\w.-]*)"),
)
_ACCOUNTS = (
    re.compile(
        r"(?:--account[= ]|#SBATCH\s+-A\s*|SLURM_(?:JOB_)?ACCOUNT=|\b[Aa]ccount=)[\"']?(?P<name>[\w.-]+)"
    ),
    re.compile(
        r"(?:--partition[= ]|#SBATCH\s+-p\s*|SLURM_(?:JOB_)?PARTITION=|\b[Pp]artition=)[\"']?(?P<name>[\w.-]+)"
    ),
)
_HOSTS = (
    re.compile(rf"\b(?:https?|tcp|ssh)://(?:[^\s/@\"']+@)?(?P<name>{_NAME})(?=:\d)"),
    re.compile(rf"(?m)(?:^|[\s,{{])[\"']?(?:hostname|host|HOSTNAME|SLURMD_NODENAME|SLURM_NODELIST|SLURM_JOB_NODELIST|HEAD_NODE)[\"']?\s*[:=]\s*[\"']?(?P<name>{_NAME})"),
    re.compile(rf"--(?:host|hostname|nodelist)[= ][\"']?(?P<name>{_NAME})"),
    re.compile(rf"(?:--nodelist[= ]|NODELIST=|NodeList=)[\"']?(?P<name>{_NAME}-?\[[\d,-]+\])"),
    re.compile(rf"\[(?P<name>[A-Za-z]{_NAME}):\d{{2,}}(?::\d+)?\]"),  # MPI's signal handler
    re.compile(rf"(?m)(?:^|[\s])(?P<name>[A-Za-z]{_NAME}):\d+:\d+ \[\d+\] NCCL"),
    re.compile(rf"(?m)^\s*-\s+[\"']?(?P<name>{_NAME}):\d{{4,5}}\b"),
    # the registry of an image, in Docker's form and in enroot's (HOST#image)
    re.compile(rf"(?:\b(?:docker|dockerd|podman|oras)://|--container-image[= ][\"']?)(?:[^\s/@\"']+@)?(?P<name>{_NAME}\.{_NAME})(?=[#:/])"),
    re.compile(rf"\b(?:srun|slurmstepd|sbatch|scancel|slurmd): error: (?P<name>{_NAME}): "),
    re.compile(rf"(?m)(?:^|[\s\"'=(])[a-z_][\w-]{{1,31}}@(?P<name>{_NAME})(?=[:\s\"')]|$)"),
)  # fmt: skip
_ADDRESS = re.compile(
    r"(?<!VER=)(?<!==)(?<![\w.-])(?!127\.|0\.0\.0\.0)(?P<name>(?:\d{1,3}\.){3}\d{1,3})(?![\w.-])"
)
_ADDRESS6 = re.compile(r"(?<![\w.:])(?P<name>[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:])")
#: MAC addresses, InfiniBand's of 20 octets, its GUIDs in both forms, and those of GPUs
_HARDWARE = re.compile(
    r"(?<![\w:-])(?P<name>(?:[0-9A-Fa-f]{2}[:-]){5}(?:(?:[0-9A-Fa-f]{2}:){14})?[0-9A-Fa-f]{2}|(?:[0-9A-Fa-f]{4}:){3}[0-9A-Fa-f]{4}"
    r"|0x[0-9A-Fa-f]{16}|(?:GPU|MIG)-[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})(?![\w:-])"
)
#: an absolute path of two parts or more; not the path of a URL, not what every machine has
_PATH = re.compile(
    r"(?:(?<![\w./<\\~])|(?<=\\[ntr])|(?<=-[IL]))(?P<name>/(?!(?:usr|bin|sbin|dev|proc|sys|etc|lib|lib64|v1|chat|dist|perf_metrics)(?:/|\b))"
    r"[\w.@%+~-]++(?:/[\w.@%+~=-]++)++)/?(?!\":\"[0-9a-f]{40})"  # LoadGen lists its own sources so, with their SHA-1
)


def collect_names(
    run_dir: Path, texts: Mapping[str, str], parameters: Mapping[str, object]
) -> dict[str, str]:
    """Everything of a run to replace literally: what -> placeholder, longest first.

    Parameters
    ----------
    texts : file -> text of the whole run. parameters : of its experiment.yaml.
    """
    found: dict[str, set[str]] = collections.defaultdict(set)
    for name, value in parameters.items():
        if _everybodys(name, value):
            continue
        for text in _strings(value):
            if text.startswith("/"):
                found["path"].add(text)
            elif name in _PARAMETERS:
                found[_PARAMETERS[name]].add(text)
            elif name == "container_image" and (
                registry := re.match(rf"(?:docker://)?({_NAME}\.{_NAME})[#:/]", text)
            ):
                found["host"].add(registry[1])
    found["path"] |= {str(run_dir.resolve()), str(Path.home()), str(Path.cwd())} - {"/"}
    found["user"].add(getpass.getuser())
    found["host"] |= {socket.gethostname(), socket.getfqdn()}
    for name, text in texts.items():
        if name.endswith("nodes.txt"):
            found["host"] |= set(text.split())
        if name.endswith("addresses.txt"):
            found["host"] |= {line.split()[1] for line in text.splitlines() if len(line.split()) == 3}
        for kind, patterns in (("user", _USERS), ("account", _ACCOUNTS), ("host", _HOSTS)):
            found[kind] |= {match["name"] for pattern in patterns for match in pattern.finditer(text)}
    found["host"] |= {host.split(".")[0] for host in found["host"] if not re.fullmatch(r"[\d.]+", host)}
    names: dict[str, str] = {}
    for kind in ("path", "host", "user", "account", "partition"):
        kept = sorted(name for name in found[kind] if _worth(kind, name))
        for number, name in enumerate(kept, 1):
            names.setdefault(name, f"REDACTED_{kind}{number}")
    return dict(sorted(names.items(), key=lambda item: (-len(item[0]), item[0])))


def _everybodys(name: str, value: object) -> bool:
    """Whether a parameter's value is its default or one of the words to choose from: such a value names nobody."""
    field = Experiment.model_fields.get(name)
    return field is not None and (bool(parameter_kind(name)[1]) or value == field.default)


def _strings(value: object) -> Iterable[str]:
    """The texts in a parameter's value; mounts such as /a:/b,/c:/d fall apart into paths."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            yield text
            yield from (part for part in re.split(r"[,:]", text) if part.startswith("/"))


def _worth(kind: str, name: str) -> bool:
    """Whether a collected name can be replaced everywhere without spoiling ordinary words."""
    if kind == "path":
        return name.count("/") > 1 or (len(name) > 4 and name[1:].lower() not in _COMMON)
    # NODE_1 is config.yaml's own placeholder; addresses have a pattern of their own
    ours = name.lower() in _COMMON | _OWN_HOSTS or re.fullmatch(r"NODE_\d+|[\d.]+", name)
    return not ours and name not in _REGISTRIES and len(name) >= 2


def _variants(name: str) -> list[str]:
    """A name as it stands in JSON, HTML, a shell script and a URL."""
    quoted = [json.dumps(name, ensure_ascii=plain)[1:-1] for plain in (True, False)]
    forms = {name, *quoted, json.dumps(quoted[0])[1:-1], html.escape(name), html.escape(name, quote=False)}
    forms |= {urllib.parse.quote(name), shlex.quote(name).strip("'")}
    return sorted(forms, key=len, reverse=True)


_BLOB = re.compile(r"(base64,|\"image/(?:png|jpeg)\": ?\")((?:[A-Za-z0-9+/=]|\\n|\s){100,})")


def _word(form: str) -> str:
    """Pattern of a name: anywhere if it is a path or no plain word, else where it stands alone."""
    plain = re.fullmatch(r"[A-Za-z]+", form)
    return rf"{_BEFORE}{form}(?![A-Za-z0-9])" if plain else re.escape(form)


class Redactor:
    """Replaces in one text after another and keeps count of what it replaced."""

    def __init__(self, names: Mapping[str, str], own: Iterable[str] = ()) -> None:
        self.placeholders = {form: mark for name, mark in names.items() for form in _variants(name)}
        forms = sorted(self.placeholders, key=len, reverse=True)
        paths = "|".join(re.escape(form) for form in forms if form.startswith("/"))
        words = "|".join(_word(form) for form in forms if not form.startswith("/"))
        self.words = re.compile(words) if words else None
        # what follows a path of the site may name people and projects: it goes too; below our own folders it is ours
        self.paths = re.compile(rf"(?:{paths})(?P<rest>[\w.@%+~=-]*(?:/[\w.@%+~=-]*)*)") if paths else None
        self.own = frozenset(own)
        self.replaced: collections.Counter[tuple[str, str]] = collections.Counter()  # file, placeholder

    def text(self, text: str, file: str) -> str:
        """The text without what must not leave, `file` for the list. Pictures in it stay as they are."""
        parts = _BLOB.split(text)  # text, mark, picture, text, ...
        parts[::3] = [self._clean(part, file) for part in parts[::3]]
        return "".join(parts)

    def _clean(self, text: str, file: str) -> str:
        for pattern in (_TOKENS, *_ASSIGNED):
            text = self._cut(pattern, "REDACTED_token", text, file)
        if self.paths:
            text = self.paths.sub(lambda match: self._path(match, file), text)
        text = self._cut(_PATH, "REDACTED_path", text, file)
        if self.words:
            text = self.words.sub(lambda match: self._mark(file, self.placeholders[match[0]]), text)
        for pattern in _ACCOUNTS:
            text = self._cut(pattern, "REDACTED_account", text, file)
        text = self._cut(_HARDWARE, "REDACTED_hardware", text, file)
        for pattern in (_ADDRESS, _ADDRESS6):
            text = self._cut(pattern, "REDACTED_address", text, file)
        return text

    def _path(self, match: re.Match, file: str) -> str:
        known = match[0][: len(match[0]) - len(match["rest"])]
        rest = match["rest"] if known in self.own and match["rest"].startswith("/") else ""
        return self._mark(file, self.placeholders[known]) + rest  # no path of its own; taken out by _clean

    def _cut(self, pattern: re.Pattern, mark: str, text: str, file: str) -> str:
        """Replace the group `name` of each match."""

        def replace(match: re.Match) -> str:
            if _harmless(match["name"], mark, file):
                return match[0]
            begin, end = (place - match.start() for place in match.span("name"))
            return match[0][:begin] + self._mark(file, mark) + match[0][end:]

        return pattern.sub(replace, text)

    def _mark(self, file: str, mark: str) -> str:
        self.replaced[file, mark] += 1
        return mark

    def refuse_rest(self, raw: bytes, file: str) -> None:
        """Raise when a token or a collected name is still in what would be shared, text or not.

        Raises
        ------
        SecretError : naming the file and the kind, never the secret itself.
        """
        text = _BLOB.sub("", raw.decode("utf-8", "replace"))
        rest = {
            mark
            for form, mark in self.placeholders.items()
            if len(form) >= 4 and form in text and re.search(_word(form), text)
        }
        for match in (match for pattern in (_TOKENS, *_ASSIGNED) for match in pattern.finditer(text)):
            if not _harmless(match["name"], "REDACTED_token", file):
                rest.add("REDACTED_token")
        if rest:
            raise SecretError(
                f"{file}: found {', '.join(sorted(rest))} still in it; needed none. Nothing was shared: "
                "take the file out of the run folder, or the name out of the file, and export again"
            )

    def listed(self) -> list[dict]:
        """What was replaced: file, placeholder, times. The originals are not in it."""
        replaced = sorted(self.replaced.items())
        return [{"file": file, "placeholder": mark, "times": times} for (file, mark), times in replaced]


def _no_address(name: str) -> bool:
    """Whether digits with points or colons are something else: a version, a time, a slice of Python, loopback."""
    if ":" not in name:
        return any(int(part) > 255 for part in name.split("."))
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return True
    short = len([group for group in name.split(":") if group]) < 3 and not address.is_link_local
    return short or address.is_loopback


_NO_SECRETS = re.compile(
    r"[\d.]+|(?:null|none|true|false|given|default|required|optional|string|redacted)\b.*", re.IGNORECASE
)


def _harmless(name: str, mark: str, file: str) -> bool:
    """Values after a key such as `token` that are settings or our own code, and version numbers like an address."""
    if name.startswith("REDACTED_"):
        return True
    if mark == "REDACTED_token":
        code = file.endswith(".py") and re.fullmatch(r"[A-Za-z_.]+", name)
        return bool(code or _NO_SECRETS.fullmatch(name))
    if mark == "REDACTED_address":
        return _no_address(name)
    return mark == "REDACTED_account" and name.lower() in ("none", "null", "")
