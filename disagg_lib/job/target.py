"""Where requests go: a URL in its parts, and the key that it wants. Agent and client ask alike."""

import os
import re
import ssl
import urllib.parse

from .client_settings import ClientError

PROBE_IDS, PROBE_TOKENS = range(1000, 1032), 4  # of a completion that only shows whether one comes, and how


class Target:
    """Where requests go: host, port, path, ssl context or None, from http(s)://HOST:PORT[/PREFIX]."""

    def __init__(self, url, endpoint):
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:  # above 65535, or no number
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ClientError(
                f"{url} is no server's address: needed is http://HOST:PORT, with a port of 1 to 65535"
            )
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = self.address = parts.hostname
        self.port = port or (443 if self.ssl else 80)
        prefix = parts.path.rstrip("/")
        if prefix.endswith("/v1") and endpoint.startswith("/v1/"):
            prefix = prefix[:-3]  # base URLs are given with and without it
        self.path = prefix + endpoint
        self.netloc = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{self.netloc}{prefix}"
        # Of external endpoints; a secret has no place in the run folder.
        self.key = os.environ.get("OPENAI_API_KEY")
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ClientError(
                "OPENAI_API_KEY: it holds what no HTTP header may, a line end, say. Set it anew"
            )
        authorization = "Authorization: Bearer %s\r\n" % self.key if self.key else ""
        # What each request begins with; its Content-Length follows.
        self.head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.netloc}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nAccept-Encoding: identity\r\n{authorization}Content-Length: "
        ).encode()

    def mask(self, text):
        """Return text without the key, also where JSON or repr() put backslashes into it."""
        return re.sub(r"\\*".join(map(re.escape, self.key)), "***", text) if self.key else text
