"""A Hugging Face hub on this machine, for tests of the real client: model info, tree, resolve, a CDN, and faults.

It differs from the real one in that commits have no history and files lie in memory. As there, small files carry
git's SHA-1 and come from the hub itself; large ones (here *.safetensors and *.bin) carry a SHA-256, and the hub
redirects to a signed address on another host, which must not see the token.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "nvidia/Llama-3.1-405B-Instruct-FP4"
SHARD = "model-00001-of-00002.safetensors"
SIGNATURE = "X-Amz-Signature=5ec2e7"
CANARY = "hf_" + "canary" * 5  # joined here, so that no tracked file holds what looks like a token


@dataclass
class Fault:
    """What to do wrong with requests whose path matches, `times` times."""

    path: str  # regular expression
    times: int = 1
    status: int | None = None  # answer with this
    headers: dict = field(default_factory=dict)
    body: dict | None = None
    cut_after: int | None = None  # close the connection after so many bytes of the body
    flip: int | None = None  # change the byte at this place of the file
    bytes_per_s: float | None = None


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    first_byte: int = 0
    sent: int = 0  # bytes of the body
    status: int = 0


class HubServer:
    """with HubServer({"owner/name": {"config.json": b"..."}}) as hub: ... hub.endpoint"""

    def __init__(self, repos: dict[str, dict[str, bytes]], token: str | None = None):
        self.repos, self.token = repos, token  # with a token: every request needs it
        self.commits = {repo: hashlib.sha1(repo.encode()).hexdigest() for repo in repos}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def bytes_sent(self, name: str) -> int:
        """Bytes of a file that went out, over all requests."""
        return sum(s.sent for s in self.seen if name in s.path and s.status in (200, 206))


def describe(name: str, content: bytes) -> dict:
    """Size and digests, as the hub states them."""
    large = name.endswith((".safetensors", ".bin"))
    sha256 = hashlib.sha256(content).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"large": large, "size": len(content), "sha256": sha256, "oid": git}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        hub, url = self.server_hub, urlsplit(self.path)
        path = unquote(url.path)
        self.seen = Seen(
            self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")
        )
        hub.seen.append(self.seen)
        fault = hub.fault(path)
        if fault and fault.status:
            return self._json(fault.status, fault.body or {}, fault.headers)
        if path.startswith("/cdn/"):
            if self.seen.authorization or SIGNATURE not in url.query:
                return self._json(400, {"error": "a CDN takes the signature only"})
            _, _, owner, name, file = path.split("/", 4)
            return self._file(file, hub.repos[f"{owner}/{name}"][file], fault, body, {})
        if hub.token and self.seen.authorization != f"Bearer {hub.token}":
            return self._json(401, {"error": "Invalid username or password."})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/(.+))?", path):
            return self._api(*found.groups(), parse_qs(url.query))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups(), fault, body)
        return self._json(404, {"error": "Not found"})

    def _repo(self, repo: str, revision: str) -> dict[str, bytes] | None:
        hub = self.server_hub
        if repo not in hub.repos:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", hub.commits[repo]):
            return self._json(
                404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"}
            )
        return hub.repos[repo]

    def _api(self, repo, revision, tree, query):
        files = self._repo(repo, revision or tree or "main")
        if files is None:
            return
        described = {name: describe(name, content) for name, content in files.items()}
        if tree:
            rows = []
            for name, d in described.items():
                lfs = {"oid": d["sha256"], "size": d["size"], "pointerSize": 134}
                rows.append(
                    {"type": "file", "path": name, "size": d["size"], "oid": d["oid"]}
                    | ({"lfs": lfs} if d["large"] else {})
                )
            return self._json(200, rows)
        siblings = []
        for name, d in described.items():
            row = {"rfilename": name}
            if "blobs" in query:
                row |= {"size": d["size"], "blobId": d["oid"]}
                if d["large"]:
                    row["lfs"] = {"sha256": d["sha256"], "size": d["size"], "pointerSize": 134}
            siblings.append(row)
        self._json(200, {"_id": "1", "id": repo, "sha": self.server_hub.commits[repo], "siblings": siblings})

    def _resolve(self, repo, revision, file, fault, body):
        files = self._repo(repo, revision)
        if files is None:
            return
        if file not in files:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        d = describe(file, files[file])
        headers = {"X-Repo-Commit": self.server_hub.commits[repo]}
        if not d["large"]:
            return self._file(file, files[file], fault, body, headers | {"ETag": f'"{d["oid"]}"'})
        headers |= {"X-Linked-Etag": f'"{d["sha256"]}"', "X-Linked-Size": str(d["size"])}
        headers["Location"] = f"http://localhost:{self.server_hub.port}/cdn/{repo}/{file}?{SIGNATURE}"
        self._json(302, {}, headers)

    def _file(self, name, content, fault, body, headers):
        start = 0
        if self.seen.range:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.seen.range)[1])
            if start >= len(content):
                return self._json(416, {}, {"Content-Range": f"bytes */{len(content)}"})
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if fault and fault.flip is not None:
            content = content[: fault.flip] + bytes([content[fault.flip] ^ 1]) + content[fault.flip + 1 :]
        self.seen.first_byte = start
        self._head(206 if start else 200, {**headers, "Content-Length": str(len(content) - start)})
        if not body:
            return
        rest = memoryview(content)[start:]
        if fault and fault.cut_after is not None:
            rest = rest[: fault.cut_after]
            self.close_connection = True
        step = 65536 if not (fault and fault.bytes_per_s) else max(1, int(fault.bytes_per_s / 20))
        try:
            for at in range(0, len(rest), step):
                self.wfile.write(rest[at : at + step])
                self.seen.sent += len(rest[at : at + step])
                if fault and fault.bytes_per_s:
                    time.sleep(step / fault.bytes_per_s)
        except OSError:  # the client went away, as some tests want
            self.close_connection = True

    def _head(self, status, headers):
        self.seen.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _json(self, status, value, headers=None):
        text = json.dumps(value).encode()
        self._head(
            status, {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(text))}
        )
        if self.command != "HEAD":
            self.wfile.write(text)
