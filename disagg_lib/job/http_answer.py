"""A streamed HTTP answer: found whole or broken, looked into twice."""

import array
import json
import re
from typing import NamedTuple, Optional

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
    "eos_first",  # [DONE] alone: the context server's token was the end token, so no generation server was asked
    "short",  # 1 token: LoadGen cannot compute TPOT and counts it as 0 tokens
    "no_count",  # neither usage nor token ids: the length of the answer is unknown
    "count_mismatch",  # usage and token ids disagree
    "prompt_mismatch",  # the server read another number of prompt tokens than it was sent
    "no_ids",  # ids are needed (accuracy), the server sends text, and there is no tokenizer
    "protocol",  # not HTTP/1.1 with server-sent events: a redirect, a compressed body
)
# How a stream ends if no chunk cuts its last event: events are single lines, so nothing else can look like this.
LAST_BYTES = b"data: [DONE]\n\n\r\n0\r\n\r\n"
STATUSES = ("ok",) + KINDS

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

DETAIL_ROOM = 300  # characters of what a failed request's server said
MOST_TOKENS = 1 << 31  # LoadGen would take more; no answer has
NO_EVENT = (
    "200 and then no event: so an orchestrator shows a generation server that refuses or is gone. "
    "See logs/output_workers.log"
)
EOS_FIRST = (
    "[DONE] alone: the model's first token was its end token. LoadGen takes an answer of 0 tokens for an error, so one "
    "is enough to make the run INVALID; if the same sample does it again, look at its prompt and at the sampling"
)


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
    """Return (text, token ids or None, finish_reason or None) of one parsed completion or chat chunk."""
    choices = message.get("choices")
    if not choices:
        return "", None, None
    choice = choices[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text, choice.get("token_ids"), choice.get("finish_reason")


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


class Read(NamedTuple):
    """What a whole answer says; the count comes from usage or from ids, never from counting chunks."""

    count: Optional[int]
    prompt_tokens: Optional[int]  # of usage
    ids: Optional[array.array] = None  # None where there is text only
    text: str = ""
    stopped: bool = False  # finish_reason is "stop": the model ended the answer itself


def read_usage(message):
    """Return (completion_tokens, prompt_tokens) of a message's usage, None for one that it lacks; AnswerError if no count."""
    usage = message.get("usage")
    if not usage:
        return None, None
    for name in ("completion_tokens", "prompt_tokens"):
        count = usage.get(name)
        if count is not None and (type(count) is not int or not 0 <= count < MOST_TOKENS):
            raise AnswerError("protocol", "%s is %r" % (name, count))
    return usage.get("completion_tokens"), usage.get("prompt_tokens")


def usage_at_end(raw):
    """Return read_usage's pair if the last events hold usage and [DONE], else None (then read everything).

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
                    return read_usage(message)
    except (ValueError, AttributeError, RecursionError):
        pass  # a second, exact look decides what this is
    return None


def read_events(payload):
    """Return the parsed messages of a whole answer; one that is broken or not at its end raises AnswerError."""
    messages, done = [], False
    *events, rest = unify_lines(payload).split(b"\n\n")
    if event_data(rest) == b"[DONE]":  # any other event without its empty line was cut
        events.append(rest)
    for event in events:
        data = event_data(event)
        if event.startswith(b"event: error") or b"\nevent: error" in event:
            raise AnswerError("server_error", repr(data))
        if data == b"[DONE]":
            done = True
        elif data:
            messages.append(parse_message(data))
    if not done:
        if payload[:1] in (b"{", b"[", b"<"):
            raise AnswerError("protocol", "no server-sent events: %r" % payload)
        raise AnswerError("cut", "%d events, no [DONE]" % len(messages) if messages else NO_EVENT)
    if not messages:
        raise AnswerError("eos_first", EOS_FIRST)
    return messages


def read_answer(payload):
    """Read a whole answer; return its Read."""
    ids, pieces, usage, only_text, finish = [], [], (None, None), False, None
    for message in read_events(payload):
        piece, piece_ids, finish_reason = content(message)
        pieces.append(piece)
        ids.extend(piece_ids or ())
        only_text = only_text or bool(piece and not piece_ids)
        finish = finish_reason or finish
        said = read_usage(message)
        usage = usage if said[0] is None else said
    count = usage[0]
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
    ids = ids if ids is None else array.array("i", ids)
    return Read(count, usage[1], ids, "".join(pieces), finish == "stop")


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
                piece, ids, _ = content(parse_message(data))
                if piece or ids:
                    self.first = piece, array.array("i", (ids or ())[:1])
                    self.settled = self.framing == "chunked"
                    return

    def result(self, want_ids):
        """Return the answer's Read; where ids are not wanted and usage tells the number, usage alone."""
        if self.status == 200 and not want_ids:
            raw = b"".join(self.payload + self.reads)
            # A quote inside a JSON string is escaped, so that no text can look like an error's key.
            if b'"error"' not in raw and b"event: error" not in raw:
                count, prompt_tokens = usage_at_end(raw) or (None, None)
                if count and count > 1:
                    return Read(count, prompt_tokens)
        if self.framing == "chunked":
            dechunk(b"".join(self.reads), self.payload)
        payload = b"".join(self.payload)
        if self.status != 200:
            kind = "http_5xx" if self.status >= 500 else "http_4xx" if self.status >= 400 else "protocol"
            kind = "http_429" if self.status == 429 else kind
            raise AnswerError(kind, "HTTP %d %s" % (self.status, payload.decode("utf-8", "replace")))
        return read_answer(payload)
