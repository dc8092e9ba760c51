"""Measuring client: MLPerf LoadGen on one side, a streaming OpenAI-compatible endpoint on the other.

Copied into the run folder and started on a compute node, once per test mode (LoadGen reads its built-in
configuration only once in a process). Python 3.8+, standard library, numpy, mlperf_loadgen; uvloop where present.

    python3 loadgen_client.py --run-dir RUN --test-mode performance|accuracy|test06 --url http://HOST:PORT

Reads RUN/job/settings.json (its "client" mapping) and RUN/user.conf. Writes
    RUN/mlperf/<mode>/               LoadGen's own files
    RUN/job/progress.jsonl           one line a second: issued, done, failed, outstanding, tokens, total, kinds
    RUN/job/client_<mode>.json       what happened, counts by kind, and how late the client itself was
    RUN/job/queries_<mode>.csv       one row a query, in the order in which they ended

Three rules keep the client out of what it measures. While an answer streams, a read is only kept; it is looked
into until the first content is found, and once more when the answer is over. Requests are bytes before the clock
runs. Nothing else runs in this process: files are written by a thread that sleeps.

A failed request is completed towards LoadGen with 0 tokens, because the test would never end otherwise. LoadGen
logs an error for each of them, which a submission checker refuses; our own result says INVALID and why.

Exit status: 0 every request was answered; 1 the run ended and is invalid; 2 refused to start; 128 + signal.
"""

import argparse
import array
import asyncio
import collections
import contextlib
import csv
import functools
import gc
import hashlib
import json
import os
import platform
import queue
import random
import re
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np

# (TTFT, TPOT) limits in ms that LoadGen 5.1 builds in for each model key, scenario Server.
LIMITS_MS = {"llama3_1-405b-interactive": (4500, 80), "llama3_1-405b": (6000, 175)}
MODES = ("performance", "accuracy", "test06")
KINDS = (
    "refused",  # no connection could be made
    "cut",  # the answer ended without [DONE], or the connection closed before its end
    "http_429",
    "http_4xx",
    "http_5xx",
    "server_error",  # an error event inside a stream that began with 200
    "timeout",  # not over after request_timeout_s
    "stalled",  # began, then silent for stall_timeout_s
    "empty",  # [DONE], but no content
    "short",  # 1 token: LoadGen cannot compute TPOT and counts it as 0 tokens
    "no_count",  # neither usage nor token ids: the length of the answer is unknown
    "count_mismatch",  # usage and token ids disagree
    "no_ids",  # ids are needed (accuracy), the server sends text, and there is no tokenizer
    "protocol",  # not HTTP/1.1 with server-sent events: a redirect, a compressed body
)
# How a stream ends if no chunk cuts its last event: events are single lines, so nothing else can look like this.
LAST_BYTES = b"data: [DONE]\n\n\r\n0\r\n\r\n"
STATUSES = ("ok",) + KINDS
FIRST_ID, END_ID = 10000, 99999  # synthetic prompts: all ids have five digits, inside Llama 3's 128256
LAG_PERIOD_S = 0.02
RESEND_S = 1.0  # an end so soon after a request was written, and without a word, is no answer to it
CONNECT_S = 30  # for each connection that is opened before the run
NO_IDS = array.array("i")
OK = b"HTTP/1.1 200 "
# The first choice's text in a whole event that ends a read, as servers commonly write it; other forms wait for the exact
# look. Of a long read only the end is looked at: the event loop must not stop for it.
HAS_CONTENT = re.compile(
    rb'(?:\r\n|\n\n)data: ?\{[^\n]*"choices": ?\[\{(?:"index": ?0, ?)?'
    rb'(?:"text"|"delta": ?\{(?:"role": ?"assistant", ?)?"content"): ?"[^"][^\n]*\}\n\n\r\n\Z'
).search
LOOK_BACK = 2048
CHUNK_SIZES = re.compile(rb"[0-9A-Fa-f\s]*").fullmatch  # or blank lines
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FILES_BESIDE = 100  # open files that are no connections
DETAIL_ROOM = 300  # characters of what a failed request's server said
MOST_TOKENS = 1 << 31  # LoadGen would take more; no answer has
# MLPerf's compliance test of token ids (mlcommons/inference compliance/TEST06), as LoadGen reads it.
TEST06 = """*.*.mode = 2
*.*.accuracy_log_rng_seed = 720381539243781796
*.*.accuracy_log_sampling_target = 100
*.*.min_query_count = 100
*.*.min_duration = 0
*.*.sample_concatenate_permutation = 0
"""


class ClientError(Exception):
    """The run cannot start; the message says where, what was found, and what to do."""


class AnswerError(Exception):
    """One request failed: kind (of KINDS), detail, which may hold all that the server said."""

    def __init__(self, kind, detail=""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


# What reading bytes that are no such answer can raise.
BAD_ANSWER = (AnswerError, ValueError, IndexError, TypeError, AttributeError, KeyError, OverflowError)
BAD_ANSWER += (RecursionError,)  # JSON nested 100,000 deep


def failure_of(error):
    """Return error as an AnswerError: whatever cannot be read is a protocol failure."""
    if isinstance(error, AnswerError):
        return error
    return AnswerError("protocol", "%s: %s" % (type(error).__name__, error))


def dechunk(raw, out):
    """Append the payload of every whole chunk of raw to out; return (bytes used, whether the body ended)."""
    pos = 0
    while True:
        eol = raw.find(b"\r\n", pos)
        if eol < 0:
            return pos, False
        size = int(raw[pos:eol].split(b";", 1)[0], 16)
        if size < 0:
            raise ValueError("chunk of size %d" % size)
        if size == 0:  # the last chunk: trailers, if any, then an empty line
            end = raw.find(b"\r\n\r\n", eol)
            return (pos, False) if end < 0 else (end + 4, True)
        start, pos_next = eol + 2, eol + 4 + size
        if pos_next > len(raw):
            return pos, False
        out.append(raw[start : start + size])
        pos = pos_next


def unify_lines(text):
    """Return text with the three line ends of server-sent events made one."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def event_data(event):
    """Return the data of one event (its lines, unified), b"" for comments and other fields."""
    if event.startswith(BYTE_ORDER_MARK):
        event = event[len(BYTE_ORDER_MARK) :]
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def content(message):
    """Return (text, token ids or None) of one parsed completion or chat chunk."""
    choices = message.get("choices")
    if not choices:
        return "", None
    choice = choices[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text, choice.get("token_ids")


def parse_message(data):
    """Return one event's JSON object; an error object or anything else raises AnswerError."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise AnswerError("protocol", "event is not JSON: %r" % data) from None
    if not isinstance(message, dict):
        raise AnswerError("protocol", "event is not a JSON object: %r" % data)
    if message.get("error") or message.get("object") == "error":
        raise AnswerError("server_error", str(message.get("error") or message.get("message")))
    return message


def token_count(message):
    """Return completion_tokens of a message's usage, None without one; anything but a count raises AnswerError."""
    count = (message.get("usage") or {}).get("completion_tokens")
    if count is not None and (type(count) is not int or not 0 <= count < MOST_TOKENS):
        raise AnswerError("protocol", "completion_tokens is %r" % (count,))
    return count


def usage_at_end(raw):
    """Return completion_tokens if the last events hold usage and [DONE], else None (then read everything).

    raw may still hold the chunked framing: a chunk's size stands on a line of its own, and one that cuts an event
    leaves JSON that cannot be read.
    """
    tail = unify_lines(raw[-2048:])
    done = False
    try:
        for event in reversed(tail[tail.find(b"\n\n") :].split(b"\n\n")):
            data = event_data(event)
            if not data:
                if not CHUNK_SIZES(event):  # of an event that a chunk cuts within "data:", say
                    return None
            elif not done:
                if data != b"[DONE]":
                    return None
                done = True
            else:
                message = json.loads(data)
                if message.get("usage"):
                    return token_count(message)
    except (ValueError, AttributeError, RecursionError):
        pass  # a second, exact look decides what this is
    return None


def read_answer(payload):
    """Read a whole answer.

    Returns
    -------
    (number of tokens, ids as array("i") or None if there is text only, text). The number comes from usage or
    from ids, never from counting chunks.
    """
    text = unify_lines(payload)
    ids, pieces, count, done, only_text = [], [], None, False, False
    *events, rest = text.split(b"\n\n")
    if event_data(rest) == b"[DONE]":  # any other event without its empty line was cut
        events.append(rest)
    for event in events:
        data = event_data(event)
        if event.startswith(b"event: error") or b"\nevent: error" in event:
            raise AnswerError("server_error", repr(data))
        if data == b"[DONE]":
            done = True
        elif data:
            message = parse_message(data)
            piece, piece_ids = content(message)
            pieces.append(piece)
            ids.extend(piece_ids or ())
            only_text = only_text or bool(piece and not piece_ids)
            said = token_count(message)
            count = count if said is None else said
    if not done:
        if payload[:1] in (b"{", b"[", b"<"):
            raise AnswerError("protocol", "no server-sent events: %r" % payload)
        raise AnswerError("cut", "%d events, no [DONE]" % len(pieces))
    if not ids and not any(pieces):
        raise AnswerError("empty", "no content before [DONE]")
    # A last text without ids, where there are as many as usage says, lacks none.
    if only_text and count != len(ids):
        ids = None
    elif count is not None and count != len(ids):
        raise AnswerError("count_mismatch", "usage says %d tokens, %d ids came" % (count, len(ids)))
    count = len(ids) if count is None and ids is not None else count
    if count is None:
        raise AnswerError("no_count", "the answer has neither usage nor token ids")
    if count < 2:
        raise AnswerError("short", "%d token" % count)
    return count, ids if ids is None else array.array("i", ids), "".join(pieces)


class Answer:
    """One HTTP answer while it arrives.

    `feed` takes bytes cut anywhere. `first` becomes (text, first id if the server sends ids) with the read that
    completes the first event with content. From then on, if the body is chunked, `settled` is true: the caller
    may append to `reads` without `feed`, unless the read could hold the end of the body.
    """

    def __init__(self):
        self.reads, self.payload = [], []  # not yet decoded, decoded
        self.status = self.left = self.scanned = 0
        self.framing = self.first = None
        self.close = self.settled = self.ended = False

    def is_empty(self):
        """Whether nothing has come yet."""
        return not (self.status or self.reads or self.payload)

    def feed(self, data):
        """Take the next bytes; ValueError or IndexError if they are not HTTP/1.1."""
        self.reads.append(data)
        if self.settled and b"".join(self.reads[-4:]).endswith(LAST_BYTES):
            self.ended = True
            return
        raw = b"".join(self.reads)
        while not self.framing:
            head, found, raw = raw.partition(b"\r\n\r\n")
            if not found:
                self.reads = [head]
                return
            self._read_head(head)
        rest = raw
        if self.framing == "chunked":
            used, self.ended = dechunk(raw, self.payload)
            rest = raw[used:]
            self.reads = [rest] if rest else []
        else:
            self.payload.append(raw)
            self.reads = []
            if self.framing == "length":
                self.left -= len(raw)
                self.ended = self.left <= 0
        if self.first is None and self.status == 200:
            self._look_for_first(rest if self.framing == "chunked" else b"")

    def _read_head(self, head):
        """Read a status line and headers; an interim answer (100 Continue) is skipped."""
        lines = head.split(b"\r\n")
        version, status = lines[0].split(None, 2)[:2]
        if not version.startswith(b"HTTP/1."):
            raise ValueError("not HTTP/1.x: %r" % lines[0][:80])
        if 100 <= int(status) < 200:
            return
        no_body = int(status) in (204, 304)
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip().lower()
        self.status = int(status)
        self.close = headers.get(b"connection") == b"close" or version == b"HTTP/1.0"
        if self.status == 200 and headers.get(b"content-encoding", b"identity") != b"identity":
            raise AnswerError(
                "protocol", "content-encoding %r was not asked for" % headers[b"content-encoding"]
            )
        if no_body:
            self.framing = "length"
        elif b"chunked" in headers.get(b"transfer-encoding", b""):
            self.framing = "chunked"
        elif b"content-length" in headers:
            self.framing, self.left = "length", int(headers[b"content-length"])
        else:
            self.framing, self.close = "eof", True

    def _look_for_first(self, rest):
        """Look for content in the events that have ended; rest is the beginning of a chunk still arriving."""
        eol = rest.find(b"\r\n")
        part = rest[eol + 2 :][: int(rest[:eol].split(b";", 1)[0], 16)] if eol > 0 else b""
        text = unify_lines(b"".join(self.payload) + part)
        while True:
            end = text.find(b"\n\n", self.scanned)
            if end < 0:
                return
            data = event_data(text[self.scanned : end])
            self.scanned = end + 2
            if data and data != b"[DONE]":
                piece, ids = content(parse_message(data))
                if piece or ids:
                    self.first = piece, array.array("i", (ids or ())[:1])
                    self.settled = self.framing == "chunked"
                    return

    def result(self, want_ids):
        """Return read_answer's triple; where ids are not wanted and usage tells the number, that alone."""
        if self.status == 200 and not want_ids:
            raw = b"".join(self.payload + self.reads)
            # A quote inside a JSON string is escaped, so that no text can look like an error's key.
            if b'"error"' not in raw and b"event: error" not in raw:
                count = usage_at_end(raw)
                if count and count > 1:
                    return count, None, None
        if self.framing == "chunked":
            dechunk(b"".join(self.reads), self.payload)
        payload = b"".join(self.payload)
        if self.status != 200:
            kind = "http_5xx" if self.status >= 500 else "http_4xx" if self.status >= 400 else "protocol"
            kind = "http_429" if self.status == 429 else kind
            raise AnswerError(kind, "HTTP %d %s" % (self.status, payload.decode("utf-8", "replace")))
        return read_answer(payload)


class Request:
    """One LoadGen sample on its way. Times are time.perf_counter() in s."""

    def __init__(self, query_id, index, issue_s):
        self.query_id, self.index, self.issue_s = query_id, index, issue_s
        self.start_s = self.sent_s = self.first_s = self.seen_s = 0.0
        self.seen = 0
        self.told = False  # LoadGen has had FirstTokenComplete
        self.resent = False
        self.connection = None


class Connection(asyncio.Protocol):
    """One keep-alive connection; it carries one request at a time."""

    def __init__(self, client):
        self.client, self.transport, self.request, self.answer = client, None, None, None
        self.keep = None  # the settled answer's `reads.append`
        self.delays_acks = False
        self.idle_since_s = time.perf_counter()
        self.used = self.reused = False

    def connection_made(self, transport):
        self.transport = transport

    def send(self, request, parts):
        """Write a prepared request."""
        self.reused, self.used = self.used, True
        self.request, self.answer = request, Answer()
        request.connection = self
        self.transport.writelines(parts)
        request.sent_s = request.sent_s or time.perf_counter()
        self.delay_acks(False)

    def abort(self):
        """End it for reasons of our own, so that nothing is sent again."""
        self.reused = False
        self.transport.abort()

    def is_closing(self):
        """Whether the server has ended it, be it that the event loop has not come to that yet.

        Nothing is due on an idle connection, so whatever there is to read tells of an end.
        """
        if self.transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    def delay_acks(self, wanted):
        """Let the kernel acknowledge two reads together, the first at most 40 ms late, or go its own way. Linux only.

        It tends to acknowledge each small read, which is a quarter of the client's CPU. A server that left Nagle's
        algorithm on waits for that before its next event, so short answers, where it would count, are left alone.
        """
        if wanted != self.delays_acks and hasattr(socket, "TCP_QUICKACK"):
            self.delays_acks = wanted
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0 if wanted else 1)

    def data_received(self, data):
        keep = self.keep
        if keep is not None and len(data) > 3 and data[-4:] != b"\r\n\r\n":
            keep(data)
        elif self.answer is not None:
            self._feed(self.answer, data)

    def _feed(self, answer, data):
        waiting = answer.first is None
        has_content = waiting and self.client.tells_early and HAS_CONTENT(data, max(0, len(data) - LOOK_BACK))
        if has_content and (answer.status == 200 or data.startswith(OK)):
            self.client.first_content(self.request, None)  # before the answer is looked into
        try:
            answer.feed(data)
        except BAD_ANSWER as error:
            self._end(failure_of(error))
            return
        if waiting and answer.first is not None:
            self.client.first_content(self.request, answer.first[1])
        if answer.ended:
            self._end(None)
        elif answer.settled:
            self.keep = answer.reads.append  # `feed` may have begun a new list

    def _end(self, error):
        """The answer is over: hand it on; keep the connection only after a whole answer."""
        request, answer = self.request, self.answer
        self.request = self.answer = self.keep = None
        reusable = error is None and answer.ended and not answer.close
        self.client.ended(request, answer, error)
        if reusable:
            self.client.put_idle(self)
        else:
            self.abort()
        self.client.start_queued()

    def connection_lost(self, exc):
        self.client.forget(self)
        if self.request is None:
            return
        soon = time.perf_counter() - self.request.sent_s < RESEND_S
        if self.reused and soon and not self.request.resent and self.answer.is_empty():
            # The server ended an idle connection as we wrote. The answer is the same whichever request gets it
            # (RFC 9110, 9.2.2), and its times count from LoadGen's issue: once more.
            self.client.resend(self.request)
            return
        whole = exc is None and self.answer.framing == "eof" or self.answer.status not in (0, 200)
        self._end(None if whole else AnswerError("cut", "connection closed: %s" % (exc or "end of stream")))


class Client:
    """Requests between LoadGen and the endpoint; everything here runs in the event loop's thread."""

    def __init__(self, loop, loadgen, target, settings, samples, mode, log):
        self.loop, self.loadgen, self.target, self.samples, self.log = loop, loadgen, target, samples, log
        self.mode, self.settings = mode, settings
        self.want_ids = mode != "performance"
        self.tells_early = not self.want_ids  # the first token's id is not asked for
        self.encode, self.no_encode = load_tokenizer(settings["tokenizer"]) if self.want_ids else (None, "")
        self.token_latencies = settings["scenario"] == "Server"
        self.connections, self.idle = set(), collections.deque()
        self.waiting, self.queued = collections.deque(), collections.deque()
        self.active, self.held = {}, []
        self.rows, self.lags = array.array("d"), array.array("f")  # seven numbers a query; s
        self.kinds = collections.Counter()
        self.issued = self.done = self.tokens = self.opening = self.reported_tokens = self.resent = 0
        self.flushed = False
        self.total, self.tasks = None, set()

    async def open_connections(self, count):
        """Open count idle connections before the run; ClientError if the endpoint refuses."""
        for _ in range(count):
            try:
                connection = await asyncio.wait_for(self._connect(), CONNECT_S)
            except (OSError, asyncio.TimeoutError) as error:
                where, why = f"{self.target.host}:{self.target.port}", str(error) or f"none in {CONNECT_S} s"
                fix = "SSL_CERT_FILE names a file of certificates to trust"
                fix = fix if isinstance(error, ssl.SSLError) else "Is the server up?"
                raise ClientError(f"{where} does not accept connections: {why}. {fix}") from None
            self.target.address = connection.transport.get_extra_info("peername")[0]  # one name look-up a run
            self.put_idle(connection)

    async def _connect(self):
        target = self.target
        name = target.host if target.ssl else None
        _, connection = await self.loop.create_connection(
            lambda: Connection(self), target.address, target.port, ssl=target.ssl, server_hostname=name
        )
        self.connections.add(connection)
        return connection

    def _open_one_more(self):
        self.opening += 1
        task = self.loop.create_task(self._open())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _open(self):
        try:
            connection = await self._connect()
        except OSError as error:
            connection, refused = None, AnswerError("refused", str(error))
        self.opening -= 1
        if connection is not None:
            self.put_idle(connection)
        elif len(self.waiting) > self.opening:
            self.ended(self.waiting.popleft(), None, refused)
            self.start_queued()

    def put_idle(self, connection):
        """A connection is free: the oldest request that waits for one takes it."""
        if self.waiting:
            request = self.waiting.popleft()
            connection.send(request, self.samples.parts[request.index])
        else:
            connection.idle_since_s = time.perf_counter()
            self.idle.append(connection)

    def forget(self, connection):
        """A connection is closed."""
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def _take_idle(self, now_s):
        """Return a free connection or None. One that idled long may be closing at the server's side right now."""
        while self.idle:
            # Unused ones first, the oldest: a server may keep a thread for each, and look at no more than it has threads.
            connection = self.idle.pop() if self.idle[-1].used else self.idle.popleft()
            fresh = not connection.used or now_s - connection.idle_since_s < self.settings["keep_alive_s"]
            if fresh and not connection.is_closing():
                return connection
            connection.abort()
        return None

    def issue(self, samples):
        """LoadGen's callback, in its thread: must return at once and must not raise."""
        now_s = time.perf_counter()
        self.loop.call_soon_threadsafe(self.begin, [(sample.id, sample.index) for sample in samples], now_s)

    def flush(self):
        """LoadGen's callback, in its thread: all queries have been issued."""
        self.loop.call_soon_threadsafe(self.set_flushed)

    def set_flushed(self):
        self.flushed, self.total = True, self.issued
        self._release_held()

    def begin(self, samples, issue_s):
        """Start requests, or queue them while max_in_flight are open (Offline)."""
        self.issued += len(samples)
        for query_id, index in samples:
            self.queued.append(Request(query_id, index, issue_s))
        self.start_queued()

    def start_queued(self):
        """Send what may be sent now."""
        limit = self.settings["max_in_flight"]
        while self.queued and (not limit or len(self.active) < limit):
            request = self.queued.popleft()
            request.start_s = request.issue_s if self.token_latencies else time.perf_counter()
            self.active[request.query_id] = request
            connection = self._take_idle(time.perf_counter())
            if connection is not None:
                connection.send(request, self.samples.parts[request.index])
            else:
                self.waiting.append(request)
                self._open_one_more()
        # Keep spare connections open ahead of need, so that a request seldom pays for its handshake.
        if len(self.idle) + self.opening < self.settings["connections"] // 4 and not self.flushed:
            self._open_one_more()

    def resend(self, request):
        """Send a request again over another connection."""
        request.resent, request.connection = True, None
        self.resent += 1
        self.waiting.append(request)
        self._open_one_more()

    def first_content(self, request, ids):
        """The first content came: LoadGen takes its TTFT here."""
        if request.first_s:
            return
        request.first_s = time.perf_counter()
        # TEST06 compares the first id with the answer's and judges no times: text waits for its ids.
        if self.mode != "test06" or ids:
            self._tell_first(request, ids)

    def _tell_first(self, request, ids):
        if self.token_latencies and not request.told:
            request.told = True
            self._tell(self.loadgen.FirstTokenComplete, request, ids)

    def _tell(self, call, request, ids, *count):
        """Hand ids, array("i") or None, to one of LoadGen's two calls; the buffer lives until the call returns."""
        address, size = (ids or NO_IDS).buffer_info()
        call([self.loadgen.QuerySampleResponse(request.query_id, address, 4 * size, *count)])

    def ended(self, request, answer, error):
        """A request is over, well or not."""
        self.active.pop(request.query_id, None)
        request.connection = None
        if error is None:
            try:
                count, ids, text = answer.result(self.want_ids)
                if not request.first_s:
                    raise AnswerError("empty", "usage says %d tokens, no content came" % count)
            except BAD_ANSWER as failure:
                error = failure_of(failure)
        if error is not None:
            self._fail(request, error)
        elif self.want_ids and ids is None:
            self.held.append((request, text))  # ids through the tokenizer, after the run
        else:
            self._serve(request, ids, count)
        self._release_held()

    def _serve(self, request, ids, count):
        self._tell_first(request, ids and ids[:1])
        self._tell(self.loadgen.QuerySamplesComplete, request, ids, count)
        self.done += 1
        self.tokens += count
        self._record(request, count, "ok")

    def _fail(self, request, error):
        # Without FirstTokenComplete LoadGen's TTFT and TPOT of the whole run would be garbage, so it gets one;
        # the 0 tokens then leave exactly one error in LoadGen's log for each failed request.
        self._tell_first(request, None)
        self._tell(self.loadgen.QuerySamplesComplete, request, None, 1 if error.kind == "short" else 0)
        self.kinds[error.kind] += 1
        if self.kinds[error.kind] <= 10:
            # Some servers echo the key: masked whole, before the text is cut.
            detail = self.target.mask(error.detail)
            self.log("request failed: sample %d: %s: %s" % (request.index, error.kind, detail[:DETAIL_ROOM]))
        self._record(request, 0, error.kind)

    def _record(self, request, count, status):
        times_s = request.issue_s, request.sent_s, request.first_s, time.perf_counter()
        self.rows.extend((request.index, *times_s, count, STATUSES.index(status)))

    def _release_held(self):
        """After the last answer: ids of text-only answers through the tokenizer, then complete them."""
        if not (self.held and self.flushed and not self.active and not self.queued):
            return
        held, self.held = self.held, []
        for request, text in held:
            if self.encode is None:
                self._fail(request, AnswerError("no_ids", "the server sends text, and " + self.no_encode))
                continue
            # Two events may hold a half each of a surrogate pair; a half alone is no text.
            ids = self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
            if len(ids) < 2:
                self._fail(request, AnswerError("short", f"{len(ids)} token after the tokenizer"))
            else:
                self._serve(request, ids, len(ids))

    def sweep(self):
        """Once a second: end requests that took too long; return the counts for progress.jsonl."""
        now_s = time.perf_counter()
        streamed = 0
        for request in list(self.active.values()):
            connection = request.connection
            answer = connection and connection.answer
            seen = len(answer.payload) + len(answer.reads) if answer else 0
            streamed += seen
            if seen != request.seen:
                # Comments show that the server lives, not that it generates. Mostly the newest read tells.
                newest = (answer.reads or answer.payload)[-max(1, seen - request.seen) :] if answer else ()
                if any(b"data:" in read for read in reversed(newest)):
                    request.seen_s = now_s
                request.seen = seen
            if answer and answer.settled:
                connection.delay_acks(True)
            quiet_s = now_s - max(request.seen_s, request.first_s) if request.first_s else 0.0
            if now_s - request.start_s > self.settings["request_timeout_s"]:
                self._give_up(request, "timeout", now_s - request.start_s)
            elif quiet_s > self.settings["stall_timeout_s"]:
                self._give_up(request, "stalled", quiet_s)
        # Reads stand for tokens until an answer is over; the sum must not fall when the true count replaces them.
        self.reported_tokens = max(self.reported_tokens, self.tokens + streamed)
        failed = sum(self.kinds.values())
        counts = {"time_s": round(time.time(), 3), "issued": self.issued, "done": self.done, "failed": failed}
        counts["outstanding"] = self.issued - self.done - failed
        counts["resent"] = self.resent
        return dict(counts, tokens=self.reported_tokens, total=self.total, kinds=dict(self.kinds))

    def _give_up(self, request, kind, seconds):
        error = AnswerError(kind, "after %.1f s" % seconds)
        if request.connection is not None:
            request.connection._end(error)
        else:
            self.waiting.remove(request)
            self.ended(request, None, error)
            self.start_queued()

    def measure_lag(self, due_s):
        """Record how late the event loop runs a timer."""
        now_s = time.perf_counter()
        self.lags.append(now_s - due_s)
        self.loop.call_later(LAG_PERIOD_S, self.measure_lag, now_s + LAG_PERIOD_S)


def load_tokenizer(path):
    """Return (function text -> ids without special tokens, "") of a tokenizer.json, or (None, why not).

    Only servers that send text need it, so its absence is no error before one does.
    """
    if not path:
        return None, "client.tokenizer is not set"
    try:
        from tokenizers import Tokenizer  # in TensorRT-LLM's container

        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        return None, "client.tokenizer %s: %s: %s" % (path, type(error).__name__, error)
    return lambda text: array.array("i", tokenizer.encode(text, add_special_tokens=False).ids), ""


class Target:
    """Where requests go: host, port, path, ssl context or None, from http(s)://HOST:PORT[/PREFIX]."""

    def __init__(self, url, endpoint):
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:  # above 65535, or no number
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ClientError("--url %s: needed is http://HOST:PORT, with a port of 1 to 65535" % url)
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = self.address = parts.hostname
        self.port = port or (443 if self.ssl else 80)
        prefix = parts.path.rstrip("/")
        if prefix.endswith("/v1") and endpoint.startswith("/v1/"):
            prefix = prefix[:-3]  # base URLs are given with and without it
        self.path = prefix + endpoint
        self.netloc = parts.netloc.rpartition("@")[2]
        # Of external endpoints; a secret has no place in the run folder.
        self.key = os.environ.get("OPENAI_API_KEY")
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ClientError(
                "OPENAI_API_KEY: it holds what no HTTP header may, a line end, say. Set it anew"
            )
        self.authorization = "Authorization: Bearer %s\r\n" % self.key if self.key else ""

    def mask(self, text):
        """Return text without the key, also where JSON or repr() put backslashes into it."""
        return re.sub(r"\\*".join(map(re.escape, self.key)), "***", text) if self.key else text


class Samples:
    """Prepared requests: parts[index] are the pieces to write, input_tokens[index] the prompt's length."""

    def __init__(self, target, settings):
        self.parts, self.input_tokens = {}, {}
        is_chat = settings["endpoint"].endswith("/chat/completions")
        keys = ("model", "temperature", "top_p", "top_k")
        self.constants = {key: settings[key] for key in keys if settings.get(key) is not None}
        self.constants.update(
            stream=True, stream_options={"include_usage": True}, **({"messages": []} if is_chat else {})
        )
        self.before = b'{"prompt_token_ids":[' if is_chat else b'{"prompt":['
        self.head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
        )
        self.head += "Accept: text/event-stream\r\nAccept-Encoding: identity\r\n"
        self.head += target.authorization + "Content-Length: "

    def add(self, index, ids_text, input_tokens, min_tokens, max_tokens):
        """Prepare sample index; ids_text is the prompt's ids, separated by commas, as bytes or memoryview."""
        limits = {"min_tokens": min_tokens, "max_tokens": max_tokens}
        after = ("]," + json.dumps(dict(self.constants, **limits))[1:]).encode()
        length = len(self.before) + len(ids_text) + len(after)
        self.parts[index] = ((self.head + f"{length}\r\n\r\n").encode() + self.before, ids_text, after)
        self.input_tokens[index] = input_tokens

    def add_synthetic(self, path, count):
        """Made-up ids: slices of one text, so that 8313 long prompts take no memory. path: lengths.csv."""
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) < count:
            raise ClientError(f"{path}: {len(rows)} rows, needed are {count}")
        try:
            lengths = [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows[:count]]
        except (KeyError, TypeError, ValueError) as error:
            raise ClientError(
                f"{path}: needed are columns input_tokens,output_tokens of integers: {error!r}"
            ) from None
        width, draw, span = len(b"%d," % FIRST_ID), random.Random(405).random, END_ID - FIRST_ID + 1
        longest = max(pair[0] for pair in lengths)
        view = memoryview(b"".join(b"%d," % (FIRST_ID + int(draw() * span)) for _ in range(longest + count)))
        for index, (input_tokens, output_tokens) in enumerate(lengths):
            ids_text = view[index * width : (index + input_tokens) * width - 1]
            self.add(index, ids_text, input_tokens, output_tokens, output_tokens)

    def add_pickle(self, data_set, limits, count):
        """MLPerf's data set, after its checksum was verified or trust was declared. limits: fewest, most tokens."""
        path, wanted, digest = Path(data_set["path"]), data_set.get("sha256"), hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
            found = digest.hexdigest()
            if wanted and found != wanted.lower():
                raise ClientError(f"{path}: sha256 is {found}, needed is {wanted}: another or a damaged file")
            if not wanted and data_set.get("trust") is not True:
                raise ClientError(
                    f"{path}: not opened, because a pickle runs code when it is read. Its sha256 is {found}: give it "
                    "as the data set's sha256 if you know this file, or declare trust_dataset: true"
                )
            file.seek(0)
            import pandas  # only this data set needs it

            frame = pandas.read_pickle(file, compression=None)
        if "tok_input" not in frame or len(frame) < count:
            columns = ", ".join(map(str, frame.columns))
            raise ClientError(
                f"{path}: {len(frame)} samples with {columns}; needed are {count} with tok_input"
            )
        for index, prompt in enumerate(frame["tok_input"][:count]):
            ids = np.asarray(prompt, dtype=np.int64).ravel().tolist()
            self.add(index, ",".join(map(str, ids)).encode(), len(ids), *limits)


def prepare_samples(run_dir, settings, target, count):
    """Return the Samples of a run that uses the first count samples of its data set."""
    samples, data_set = Samples(target, settings), settings["data_set"]
    if data_set["kind"] == "synthetic":
        samples.add_synthetic(run_dir / data_set["lengths"], count)
    elif data_set["kind"] == "pickle":
        samples.add_pickle(data_set, (settings["min_output_tokens"], settings["max_output_tokens"]), count)
    else:
        raise ClientError(
            f"settings.json: data_set.kind is {data_set['kind']!r}; known are synthetic, pickle"
        )
    return samples


def configure(loadgen, run_dir, settings, mode):
    """Return LoadGen's TestSettings for this run; ClientError unless limits and token latencies are really set.

    A wrong model key or scenario makes FromConfig answer 0 and fall back to other limits without a word.
    """
    scenario, key, user_conf = settings["scenario"], settings["model_key"], run_dir / settings["user_conf"]
    if scenario not in ("Server", "Offline"):
        raise ClientError(f"settings.json: client.scenario is {scenario!r}; known are Server, Offline")
    test = loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, scenario)
    test.mode = loadgen.TestMode.AccuracyOnly if mode == "accuracy" else loadgen.TestMode.PerformanceOnly
    code = test.FromConfig(str(user_conf), key, scenario)
    if code != 0:
        raise ClientError(f"{user_conf}: LoadGen could not read it (FromConfig returned {code})")
    if key not in LIMITS_MS:
        raise ClientError(f"settings.json: client.model_key is {key!r}; known are {', '.join(LIMITS_MS)}")
    limits_ms = test.ttft_latency / 1e6, test.tpot_latency / 1e6
    if not test.use_token_latencies or limits_ms != LIMITS_MS[key]:
        raise ClientError(
            f"LoadGen took model key {key!r}, scenario {scenario}: token latencies {test.use_token_latencies}, TTFT and "
            f"TPOT limit {limits_ms} ms; needed are True, {LIMITS_MS[key]} ms. Is this mlcommons-loadgen 5.1.2?"
        )
    return test


def scheduled_s(test, count):
    """Return LoadGen's arrival times, s after the first: it draws them from mt19937 and its schedule seed.

    Source: mlcommons/inference loadgen (std::mt19937, std::exponential_distribution); seen equal to what 5.1.2 issues.
    """
    draws = np.random.RandomState(test.schedule_rng_seed & 0xFFFFFFFF)
    words = draws.randint(0, 2**32, size=2 * count, dtype=np.uint64).astype(np.float64)
    uniform = (words[0::2] + words[1::2] * 2.0**32) / 2.0**64
    gaps = -np.log(1.0 - uniform) / test.server_target_qps
    return np.concatenate([[0.0], np.cumsum(gaps)[:-1]])


RESULT_KEYS = ("generated_query_count", "generated_samples_per_query", "loadgen_version", "result_validity")


def read_log(path):
    """Return {key: value} of RESULT_KEYS, as far as LoadGen has written them, `generated` samples, and `errors`."""
    found = {"errors": 0, "generated": None}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        found["errors"] += '"is_error": true' in line
        if any(f'"key": "{key}"' in line for key in RESULT_KEYS):
            with contextlib.suppress(ValueError):  # the last line may still be in the making
                entry = json.loads(line[line.index("{") :])
                found[entry["key"]] = entry["value"]
    if "generated_query_count" in found and "generated_samples_per_query" in found:
        found["generated"] = found["generated_query_count"] * found["generated_samples_per_query"]
    return found


class Recorder(threading.Thread):
    """Writes messages and progress; a shared file system may take its time without holding up the event loop."""

    def __init__(self, progress, mode, target_qps, detail_log):
        super().__init__(daemon=True)
        self.lines, self.total, self.detail_log = queue.Queue(), None, detail_log
        self.progress, self.words = progress, {"mode": mode, "target_qps": target_qps}
        self.prefix = "loadgen_client %s: " % mode

    def log(self, text):
        self.lines.put(text)

    def run(self):
        for line in iter(self.lines.get, None):
            try:
                self._write(line)
            except OSError as error:  # a full disk, say: the run goes on, and so does this thread
                with contextlib.suppress(OSError):
                    print("%sreport not written: %s" % (self.prefix, error), file=sys.stderr, flush=True)

    def _write(self, line):
        if isinstance(line, str):
            print(self.prefix + line, flush=True)
            return
        if line["total"] is None and self.total is None:
            self.total = read_log(self.detail_log)["generated"]
        with open(self.progress, "a") as file:
            file.write(json.dumps(dict(line, total=line["total"] or self.total, **self.words)) + "\n")

    def stop(self):
        self.lines.put(None)
        self.join(10)


def percentile_ms(values_s, percent):
    """Return a percentile of seconds in ms, None of nothing."""
    return round(float(np.percentile(values_s, percent)) * 1e3, 4) if len(values_s) else None


COLUMNS = ("sample_index", "issue_s", "late_ms", "ttft_ms", "latency_ms", "input_tokens", "output_tokens")


def write_queries(path, rows, late_s, input_tokens):
    """Write one row a query. ttft_ms and latency_ms count from the issue; LoadGen's add the schedule's lateness."""
    begin_s = rows[:, 1].min() if len(rows) else 0.0
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS + ("status",))
        for (index, issue_s, _, first_s, end_s, count, status), late in zip(rows.tolist(), late_s.tolist()):
            late_ms = "" if late != late else f"{1e3 * late:.4f}"
            ttft_ms = f"{1e3 * (first_s - issue_s):.4f}" if first_s else ""
            times = [f"{issue_s - begin_s:.6f}", late_ms, ttft_ms, f"{1e3 * (end_s - issue_s):.4f}"]
            out.writerow([int(index), *times, input_tokens[int(index)], int(count), STATUSES[int(status)]])


def lateness_s(rows, test):
    """Return how late each request was written after LoadGen's schedule; rows are all queries of a Server run.

    Sorted issue times meet the schedule one to one; the test began when the promptest query was issued.
    """
    order = np.argsort(rows[:, 1], kind="stable")
    issue_s, sent_s = rows[order, 1], np.maximum(rows[order, 2], rows[order, 1])
    behind_s = issue_s - scheduled_s(test, len(rows))
    late_s = np.empty(len(rows))
    late_s[order] = behind_s - behind_s.min() + (sent_s - issue_s)
    return late_s


class Run:
    """One test mode from start to result."""

    def __init__(self, run_dir, mode, url, settings, progress, progress_mode):
        import mlperf_loadgen

        self.run_dir, self.mode, self.url, self.settings = run_dir, mode, url, settings
        self.loadgen = mlperf_loadgen
        self.out_dir = run_dir / "mlperf" / mode
        self.out_dir.mkdir(parents=True, exist_ok=True)
        old = ", ".join(sorted(path.name for path in self.out_dir.glob("mlperf_log_*")))
        if old:
            raise ClientError(f"{self.out_dir} already holds {old}: a run never overwrites another")
        self.test = configure(mlperf_loadgen, run_dir, settings, mode)
        # LoadGen would otherwise take an audit.config that happens to lie in the working directory.
        self.audit = run_dir / "job" / ("audit.config" if mode == "test06" else "no_audit.config")
        if mode == "test06":
            self.audit.write_text(TEST06)
        total, few = settings["total_sample_count"], settings["accuracy_sample_count"]
        self.count = min(few, total) if mode == "accuracy" else total
        self.target = Target(url, settings["endpoint"])
        self.samples = prepare_samples(run_dir, settings, self.target, self.count)
        target_qps = self.test.server_target_qps if settings["scenario"] == "Server" else None
        log = self.out_dir / "mlperf_log_detail.txt"
        self.recorder = Recorder(progress, progress_mode or mode, target_qps, log)
        self.started_s = self.started_cpu_s = 0.0
        self.error = None

    async def main(self):
        """Run LoadGen to its end; return the exit status."""
        loop = asyncio.get_running_loop()
        parts = self.loadgen, self.target, self.settings, self.samples, self.mode, self.recorder.log
        client = Client(loop, *parts)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # Offline may open thousands of connections
        offline = self.settings["scenario"] == "Offline"
        most_open = min(self.settings["max_in_flight"] or self.count, self.count) if offline else 0
        needed = FILES_BESIDE + most_open
        if most != resource.RLIM_INFINITY and most < needed:
            fix = "Raise `ulimit -Hn`" + ", or lower max_in_flight" * offline
            raise ClientError(f"{most} files may be open (ulimit -Hn), needed are {needed}. {fix}")
        await client.open_connections(self.settings["connections"])
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped, client, number)
        self.recorder.start()
        finished = asyncio.Event()
        self.started_s, self.started_cpu_s = time.perf_counter(), time.process_time()
        gc.collect()
        gc.freeze()
        gc.disable()  # no cycles are made while requests run; a collection would stop the loop for milliseconds
        sys.setswitchinterval(1e-4)  # LoadGen's thread waits at most this long for the interpreter
        client.measure_lag(self.started_s)
        report = functools.partial(loop.call_soon_threadsafe, finished.set)
        threading.Thread(target=self._run_loadgen, args=(client, report), daemon=True).start()
        while not finished.is_set():
            try:
                await asyncio.wait_for(finished.wait(), 1.0)
            except asyncio.TimeoutError:
                self.recorder.lines.put(client.sweep())
        self.recorder.lines.put(client.sweep())
        for connection in list(client.connections):
            connection.abort()
        return self._finish(client, "error" if self.error else "finished")

    def _run_loadgen(self, client, report):
        """Run the test in its own thread; LoadGen returns when every query is completed."""
        lg = self.loadgen
        try:
            qsl = lg.ConstructQSL(self.count, self.count, lambda _: None, lambda _: None)
            sut = lg.ConstructSUT(client.issue, client.flush)
            log = lg.LogSettings()
            log.enable_trace = False
            log.log_output.outdir = str(self.out_dir)
            lg.StartTestWithLogSettings(sut, qsl, self.test, log, str(self.audit))
            lg.DestroySUT(sut)
            lg.DestroyQSL(qsl)
        except Exception as error:  # reported below: this thread has nobody to raise to
            self.error = "LoadGen: %s: %s" % (type(error).__name__, error)
        report()

    def _stopped(self, client, number):
        """SIGTERM or SIGINT: LoadGen cannot be interrupted, so write what is known and leave."""
        name = signal.Signals(number).name
        self.recorder.log("%s: stopping with %d requests open" % (name, len(client.active)))
        self._finish(client, "stopped by %s" % name)
        sys.stdout.flush()
        os._exit(128 + number)

    def _finish(self, client, status):
        """Write client_<mode>.json and queries_<mode>.csv; return the exit status."""
        rows = np.array(client.rows).reshape(-1, 7)
        late_s = np.full(len(rows), np.nan)
        if status == "finished" and len(rows) and self.settings["scenario"] == "Server":
            late_s = lateness_s(rows, self.test)
        job, result = self.run_dir / "job", self.result(client, status, late_s[~np.isnan(late_s)])
        try:
            (job / ("client_%s.json" % self.mode)).write_text(json.dumps(result, indent=1) + "\n")
            write_queries(job / ("queries_%s.csv" % self.mode), rows, late_s, self.samples.input_tokens)
        except OSError as error:
            result["reasons"].append("the result could not be written: %s" % error)
            result["valid_client"] = False
        self.recorder.log(
            "{done} of {issued} requests served, {output_tokens} output tokens, {wall_s} s, client CPU {client_cpu_s} "
            "s, loop lag p99 {loop_lag_p99_ms} ms, {resent} sent twice: ".format(**result)
            + ("answered" if result["valid_client"] else "INVALID: " + "; ".join(result["reasons"]))
        )
        self.recorder.stop()
        return 0 if result["valid_client"] else 1

    def result(self, client, status, late_s):
        """Return what client_<mode>.json holds."""
        values = read_log(self.out_dir / "mlperf_log_detail.txt")
        errors = values["errors"]
        failed, limit_ms = sum(client.kinds.values()), self.test.ttft_latency / 1e6 * 0.01
        reasons = ["%d requests failed: %s" % (count, kind) for kind, count in sorted(client.kinds.items())]
        if status != "finished":
            reasons.append(self.error or status)
        if errors > failed:
            reasons.append("LoadGen's log holds %d errors, %d requests failed" % (errors, failed))
        late_count = int((1e3 * late_s > limit_ms).sum())
        words = {key: self.settings[key] for key in ("scenario", "model_key", "endpoint")}
        result = dict(
            words, mode=self.mode, url=self.url, status=status, valid_client=not reasons, reasons=reasons
        )
        result.update(issued=client.issued, done=client.done, failed=failed, generated=values["generated"])
        result.update(outstanding=client.issued - client.done - failed, output_tokens=client.tokens)
        result.update(kinds={kind: client.kinds[kind] for kind in KINDS}, resent=client.resent)
        result["wall_s"] = round(time.perf_counter() - self.started_s, 3)
        result["client_cpu_s"] = round(time.process_time() - self.started_cpu_s, 3)
        result["max_rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0, 1)
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100)):
            result["loop_lag_%s_ms" % name] = percentile_ms(client.lags, percent)
            result["late_%s_ms" % name] = percentile_ms(late_s, percent)
        result.update(ttft_limit_ms=self.test.ttft_latency / 1e6, tpot_limit_ms=self.test.tpot_latency / 1e6)
        result.update(late_limit_ms=limit_ms, late_issues=late_count, client_was_late=late_count > 0)
        result.update(loadgen_errors=errors, loadgen_validity=values.get("result_validity"))
        result.update(loadgen_version=values.get("loadgen_version"), python=platform.python_version())
        uvloop = sys.modules.get("uvloop")
        return dict(result, numpy=np.__version__, uvloop=uvloop and uvloop.__version__)


DEFAULTS = {
    "tokenizer": None,  # tokenizer.json; accuracy and TEST06 need it if the server sends text without ids
    "max_in_flight": None,  # Offline: None means all at once
    "stall_timeout_s": 60.0,
    "keep_alive_s": 3.0,  # below the 5 s after which uvicorn (TensorRT-LLM's server) closes an idle connection
    "scenario": "Server",
    "accuracy_sample_count": 8313,
    "connections": 8,
    "request_timeout_s": 600.0,
}
REQUIRED = ("endpoint", "model", "model_key", "user_conf", "total_sample_count", "data_set")


def read_settings(run_dir):
    """Return the "client" mapping of RUN/job/settings.json with defaults filled in."""
    path = run_dir / "job" / "settings.json"
    try:
        given = json.loads(path.read_text())["client"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClientError("%s: cannot read the mapping 'client': %r" % (path, error)) from None
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise ClientError("%s: client lacks %s" % (path, ", ".join(missing)))
    return dict(DEFAULTS, **given)


def new_event_loop():
    """Return uvloop's event loop where installed, asyncio's otherwise."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main(arguments=None):
    """Run one test mode; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--test-mode", choices=MODES, required=True)
    parser.add_argument("--url", required=True, help="http://HOST:PORT of the server")
    parser.add_argument("--progress", type=Path, help="default: RUN/job/progress.jsonl")
    parser.add_argument("--progress-mode", help="the word for mode in it")
    options = parser.parse_args(arguments)
    run_dir = options.run_dir.resolve()
    progress = options.progress or run_dir / "job" / "progress.jsonl"
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        settings = read_settings(run_dir)
        run = Run(run_dir, options.test_mode, options.url, settings, progress, options.progress_mode)
        return loop.run_until_complete(run.main())
    except (ClientError, OSError) as error:
        print("loadgen_client: refused to start: %s" % error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # LoadGen's and the recorder's threads have nothing left to say
