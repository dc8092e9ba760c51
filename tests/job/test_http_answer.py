"""Answers as bytes: every way a network can cut them gives the same tokens and the same moment of first content."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_lib.job import client_settings, connections, http_answer, prompts

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(message, end=b"\n") -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + end + end


def choice(**fields) -> dict:
    return {"choices": [{"index": 0, **fields}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}
EVENTS = [
    b": a comment\n\n",
    event(choice(text="")),
    event(choice(text=" a", token_ids=[11])),
    event(choice(text='"usage":{\n\n', token_ids=[12, 13])) + event(choice(text="", token_ids=[14])),
    event(USAGE),
    event(b"[DONE]"),
]
CHAT = [
    event(choice(delta={"role": "assistant"}), b"\r\n"),
    event(choice(delta={"role": "assistant", "content": ""}), b"\r\n"),
    event(choice(delta={"content": " a"}), b"\r\n"),
    b"event: x\r\ndata: " + json.dumps(choice(delta={"content": "b"})).encode() + b"\r\nid: 7\r\n\r\n",
    event(USAGE, b"\r\n"),
    event(b"[DONE]", b"\r\n"),
]
PLAIN = b"".join(EVENTS)
# None of these is content, though each looks like it in some way.
LOOK_ALIKES = [
    b': {"choices": [{"text": "x"}]}\n\n',
    b"event: meta\n" + event({"content": "queued", "text": "x"}),
    event({"choices": [{"index": 0, "text": ""}, {"index": 1, "text": "x"}]}),
    event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "content": "x"}]}),
]
STREAMS = {
    "an event a chunk": CHUNKED + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n",
    "after 100 Continue": b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"
    + CHUNKED
    + b"".join(map(chunk, EVENTS))
    + b"0\r\n\r\n",
    "events cut by chunks": CHUNKED
    + b"".join(chunk(PLAIN[at : at + 37]) for at in range(0, len(PLAIN), 37))
    + b"0\r\n\r\n",
    "all in one chunk": CHUNKED + chunk(PLAIN) + b"0\r\n\r\n",
    "extensions and trailers": CHUNKED.replace(b"chunked", b"Chunked").replace(b"Transfer-E", b"tRANSFER-e")
    + b"".join(chunk(part).replace(b"\r\n", b";x=y\r\n", 1) for part in EVENTS)
    + b"0\r\nChecksum: 1\r\n\r\n",
    "chat, CRLF lines": CHUNKED + b"".join(map(chunk, CHAT)) + b"0\r\n\r\n",
    "look-alikes before content": CHUNKED + b"".join(map(chunk, LOOK_ALIKES + EVENTS)) + b"0\r\n\r\n",
    "byte-order mark": CHUNKED
    + b"".join(map(chunk, [b"\xef\xbb\xbf" + EVENTS[2], *EVENTS[3:]]))
    + b"0\r\n\r\n",
    "usage in every event": CHUNKED
    + b"".join(
        chunk(event({**choice(text=text, token_ids=[10 + n]), "usage": {"completion_tokens": n}}))
        for n, text in enumerate([" a", '"usage":{\n\n', "", ""], 1)
    )
    + chunk(event(b"[DONE]"))
    + b"0\r\n\r\n",
    "with a length": HEAD + b"content-length:%d\r\n\r\n" % len(PLAIN) + PLAIN,
    "until the connection closes": HEAD + b"\r\n" + PLAIN,
}


class Heard:
    """Stands for the Client behind a Connection: keeps what it is told, and after how many bytes."""

    def __init__(self, tells_early=False):
        self.first, self.end, self.fed = None, None, 0
        self.tells_early = tells_early
        self.client, self.target = self, SimpleNamespace(head=b"")  # it stands in the pool's place, too

    def first_content(self, request, ids):
        assert self.first is None or self.tells_early
        self.first = self.first or (self.fed, ids and ids.tolist())

    def ended(self, request, answer, error):
        self.end = answer, error

    def put_idle(self, connection):
        self.kept = True

    def start_queued(self):
        pass

    def forget(self, connection):
        pass


class Pipe:
    def writelines(self, parts):
        pass

    def abort(self):
        pass


def hear(stream: bytes, cuts, want_ids):
    """Feed stream to a real Connection, cut at the given places; return what the client behind it heard."""
    heard = Heard(tells_early=not want_ids)
    connection = connections.Connection(heard)
    connection.connection_made(Pipe())
    connection.send(connections.Request(1, 0, 0.0, heard), ())
    places = sorted({0, *cuts, len(stream)})
    for start, end in zip(places, places[1:], strict=False):
        heard.fed = end
        connection.data_received(stream[start:end])
    if heard.end is None:
        connection.connection_lost(None)
    answer, error = heard.end
    if error is not None:
        raise error
    count, _, ids, text, _ = answer.result(want_ids)
    first = heard.first[0], answer.first[0], heard.first[1]
    return (first, count, ids and ids.tolist(), text) if want_ids else (first[:1], count)


def first_place(stream):
    """The number of bytes after which the first content is known, fed byte by byte."""
    return hear(stream, range(len(stream)), True)[0][0]


@pytest.mark.parametrize("name", STREAMS)
def test_recorded_stream_is_read_whole(name):
    first, count, ids, text = hear(STREAMS[name], (), True)
    assert count == 4 and first[1] == " a"
    if name != "chat, CRLF lines":
        assert ids == [11, 12, 13, 14] and first[2] == [11] and text == ' a"usage":{\n\n'


@pytest.mark.parametrize("want_ids", [True, False])
@pytest.mark.parametrize("name", STREAMS)
def test_every_single_cut_gives_the_same_tokens_and_first_content(name, want_ids):
    stream = STREAMS[name]
    place = first_place(stream)
    whole = hear(stream, (), want_ids)
    for cut in range(1, len(stream)):
        first, *rest = hear(stream, (cut,), want_ids)
        assert rest == list(whole[1:])
        assert first == ((cut if cut >= place else len(stream)), *whole[0][1:])


@pytest.mark.parametrize("name", STREAMS)
def test_byte_by_byte_gives_the_same_tokens(name):
    stream = STREAMS[name]
    assert hear(stream, range(len(stream)), True)[1:] == hear(stream, (), True)[1:]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(STREAMS)),
    cuts=st.sets(st.integers(1, 1500), max_size=12),
    want_ids=st.booleans(),
)
def test_any_set_of_cuts_gives_the_same_tokens_and_first_content(name, cuts, want_ids):
    stream = STREAMS[name]
    cuts = {cut for cut in cuts if cut < len(stream)}
    place = first_place(stream)
    first, *rest = hear(stream, cuts, want_ids)
    assert rest == list(hear(stream, (), want_ids)[1:])
    assert first[0] == min(cut for cut in {*cuts, len(stream)} if cut >= place)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(STREAMS)), where=st.floats(0, 1), want_ids=st.booleans())
def test_stream_that_ends_early_is_cut_never_counted(name, where, want_ids):
    stream = STREAMS[name]
    end = int(where * (len(stream) - len(b"data: [DONE]\r\n\r\n\r\n0\r\n\r\n")))
    with pytest.raises(http_answer.AnswerError) as caught:
        hear(stream[:end], (end // 2,), want_ids)
    assert caught.value.kind == "cut"


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(max_size=300), cut=st.integers(0, 300))
def test_junk_is_a_failure_and_raises_nothing_else(junk, cut):
    for head in (b"", CHUNKED, HEAD + b"\r\n", CHUNKED + chunk(EVENTS[2])):
        with pytest.raises(http_answer.AnswerError):
            try:
                hear(head + junk, (cut,), True)
            except http_answer.BAD_ANSWER as error:
                raise http_answer.failure_of(error) from None


@pytest.mark.parametrize(
    "events, kind",
    [
        ([event(b"[DONE]")], "eos_first"),
        ([event(choice(text="")), event(b"[DONE]")], "empty"),
        ([event(choice(text="a", token_ids=[1])), event(b"[DONE]")], "short"),
        ([event(choice(text="a")), event(choice(text="b")), event(b"[DONE]")], "no_count"),
        ([event(choice(text="a", token_ids=[1, 2])), event(USAGE), event(b"[DONE]")], "count_mismatch"),
        ([event(choice(text="a")), event({"error": {"message": "x"}}), event(b"[DONE]")], "server_error"),
        ([event(choice(text="a", token_ids=["x"])), event(b"[DONE]")], "protocol"),
        ([event(choice(text="a", token_ids=[1 << 40])), event(b"[DONE]")], "protocol"),
        ([event({"choices": [5]}), event(b"[DONE]")], "protocol"),
        ([event(b"[1]"), event(b"[DONE]")], "protocol"),
        ([event(b"not json"), event(b"[DONE]")], "protocol"),
        ([b'{"choices": [{"text": "not a stream"}]}'], "protocol"),
    ],
)
def test_answer_without_a_true_count_fails_by_kind(events, kind):
    stream = CHUNKED + b"".join(map(chunk, events)) + b"0\r\n\r\n"
    with pytest.raises(http_answer.AnswerError) as caught:
        try:
            hear(stream, (), True)
        except http_answer.BAD_ANSWER as error:
            raise http_answer.failure_of(error) from None
    assert caught.value.kind == kind


@pytest.mark.parametrize("want_ids", [True, False])
@pytest.mark.parametrize("count", [5.0, 1e30, 2**40, -1, "4", True])
def test_usage_that_is_no_count_is_a_failure(count, want_ids):
    usage = {"choices": [], "usage": {"completion_tokens": count}}
    stream = CHUNKED + b"".join(map(chunk, [EVENTS[2], event(usage), event(b"[DONE]")])) + b"0\r\n\r\n"
    with pytest.raises(http_answer.AnswerError, match="completion_tokens is"):
        hear(stream, (), want_ids)


@pytest.mark.parametrize("want_ids", [True, False])
@pytest.mark.parametrize(
    "bad",
    [
        event({"error": "x"}),
        b"event: error\n" + event({"message": "x"}),
        event({"object": "error", "message": "x"}),
    ],
)
def test_error_amid_a_stream_is_a_failure_even_if_usage_follows(bad, want_ids):
    parts = [EVENTS[2], EVENTS[3], bad, event(USAGE), event(b"[DONE]")]
    with pytest.raises(http_answer.AnswerError) as caught:
        hear(CHUNKED + b"".join(map(chunk, parts)) + b"0\r\n\r\n", (), want_ids)
    assert caught.value.kind == "server_error"


def test_text_that_speaks_of_errors_is_no_error():
    quoted = event(choice(text=' the "error": {"error"} event: errors'))
    parts = [quoted, EVENTS[2], event(USAGE), event(b"[DONE]")]
    assert hear(CHUNKED + b"".join(map(chunk, parts)) + b"0\r\n\r\n", (), False)[1] == 4


def test_json_without_end_of_nesting_is_a_protocol_failure():
    stream = (
        CHUNKED + chunk(EVENTS[2]) + chunk(event(b"[" * 100_000)) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    )
    with pytest.raises(http_answer.AnswerError) as caught:
        hear(stream, (), True)
    assert caught.value.kind == "protocol"


@pytest.mark.parametrize("separators", [None, (",", ":")])
@pytest.mark.parametrize(
    "fields",
    [
        {"text": " a", "token_ids": [11]},
        {"delta": {"role": "assistant", "content": " a"}},
        {"delta": {"content": " a"}, "finish_reason": None},
    ],
)
def test_content_as_servers_write_it_is_told_before_it_is_parsed(fields, separators):
    data = json.dumps({"id": "x", "model": "m", **choice(**fields)}, separators=separators)
    assert http_answer.HAS_CONTENT(CHUNKED + chunk(event(data.encode())))


def test_a_long_first_read_is_not_searched_from_its_beginning():
    """An orchestrator that paused sends everything at once, without an event's end at the end."""
    heard, looked = Heard(tells_early=True), []
    connection = connections.Connection(heard)
    connection.connection_made(Pipe())
    connection.send(connections.Request(1, 0, 0.0, heard), ())
    search = connections.HAS_CONTENT
    connections.HAS_CONTENT = lambda data, start: looked.append(len(data) - start) or search(data, start)
    try:
        connection.data_received(CHUNKED + chunk(EVENTS[2]) * 2000 + b"5")
    finally:
        connections.HAS_CONTENT = search
    assert looked == [http_answer.LOOK_BACK] and heard.first


@pytest.mark.parametrize(
    "answer, word",
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
        (b"HTTP/1.1 307 Moved\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "HTTP 307"),
        (CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), "content-encoding b'gzip'"),
    ],
)
def test_what_is_no_stream_ends_at_once_and_says_what_it_is(answer, word):
    with pytest.raises(http_answer.AnswerError, match=word) as caught:
        hear(answer, (), False)
    assert caught.value.kind == "protocol"


def test_last_text_without_ids_lacks_none_where_usage_counts_as_many():
    parts = [*EVENTS[:4], event(choice(text=".", token_ids=None)), *EVENTS[4:]]
    assert hear(CHUNKED + b"".join(map(chunk, parts)) + b"0\r\n\r\n", (), True)[2] == [11, 12, 13, 14]


def test_empty_lists_of_ids_beside_text_are_no_ids():
    parts = [event(choice(text=text, token_ids=[])) for text in "abcd"] + EVENTS[4:]
    assert hear(CHUNKED + b"".join(map(chunk, parts)) + b"0\r\n\r\n", (), True)[1:] == (4, None, "abcd")


@pytest.mark.parametrize("want_ids", [True, False])
def test_wherever_a_chunk_cuts_the_last_event_its_usage_counts(want_ids):
    """Usage in every event, as some servers can be told to send it: the last but one's would do as well to look at."""
    body = b"".join(event({**choice(text=" t"), "usage": {"completion_tokens": n}}) for n in (2, 3, 4))
    for place in range(body.rindex(b"data:"), len(body)):
        parts = [body[:place], body[place:], event(b"[DONE]")]
        assert hear(CHUNKED + b"".join(map(chunk, parts)) + b"0\r\n\r\n", (), want_ids)[1] == 4, place


@pytest.mark.parametrize(
    "answer, kind",
    [
        (b"HTTP/1.1 429 X\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", "http_429"),
        (b"HTTP/1.1 503 X\r\nContent-Length: 9\r\n\r\nbus", "http_5xx"),
    ],
)
def test_status_names_the_failure_whatever_its_body_is(answer, kind):
    with pytest.raises(http_answer.AnswerError) as caught:
        hear(answer, (), False)
    assert caught.value.kind == kind


def test_connection_is_kept_only_after_a_whole_answer():
    for name, stream in STREAMS.items():
        heard = Heard()
        connection = connections.Connection(heard)
        connection.connection_made(Pipe())
        connection.send(connections.Request(1, 0, 0.0, heard), ())
        connection.data_received(stream)
        assert hasattr(heard, "kept") == (name != "until the connection closes")


def test_long_prompts_of_the_whole_data_set_take_little_memory_and_time(tmp_path):
    import time
    import tracemalloc

    options = {**client_settings.DEFAULTS, "endpoint": "/v1/completions", "model": "m"}
    samples = prompts.Samples(options)
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n" + "9400,650\n" * 8313)
    tracemalloc.start()
    start = time.perf_counter()
    samples.add_synthetic(lengths, 8313)
    assert time.perf_counter() - start < 10
    assert tracemalloc.get_traced_memory()[0] < 50e6
    tracemalloc.stop()
    assert len(samples.parts) == 8313
    beginnings = {bytes(parts[1][:60]) for parts in samples.parts.values()}
    assert len(beginnings) == 8313  # no two prompts begin alike, so none is served from a cache of another
