"""Requests as the real server takes them, answers as it gives them."""

import json
import time
import zlib
from typing import Annotated, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from .configuration import known_keys
from .engine import Sequence

FIRST_TOKEN_ID, TOKEN_IDS, END_TOKEN = 1000, 4096, 128009  # the last one is Llama 3's <|eot_id|>
DONE = b"data: [DONE]\n\n"

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
EVENT_STREAM = {"Content-Type": "text/event-stream"}
STATUS = {400: web.HTTPBadRequest, 429: web.HTTPTooManyRequests, 500: web.HTTPInternalServerError}

TokenIds = Annotated[list[NonNegativeInt], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
OnePrompt = Annotated[list[Text | TokenIds], Field(min_length=1, max_length=1)]


class Strict(BaseModel):
    """Of the right types; which names there may be, the release's own list says."""

    model_config = ConfigDict(strict=True)


class DisaggregatedParams(Strict):
    """What a context server hands on; its state holds the GPUs that the KV cache lies on."""

    request_type: str | None = None
    first_gen_tokens: TokenIds | None = None
    ctx_request_id: int | None = None
    encoded_opaque_state: str | None = Field(None, pattern=r"^[1-9]\d{0,5}$")
    disagg_request_id: int | None = None


class StreamOptions(Strict):
    """What a stream tells besides its tokens; usage in every chunk is v5.1's default."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = None


class Body(Strict):
    """What a request asks for, as far as the serving model cares; the names it may bear besides are in data/trtllm_keys.yaml."""

    model: str
    prompt: Text | TokenIds | OnePrompt | None = None
    messages: list[dict] | None = None
    prompt_token_ids: TokenIds | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    min_tokens: NonNegativeInt | None = None
    detokenize: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    disaggregated_params: DisaggregatedParams | None = None

    def tokens(self, chat: bool) -> list[int]:
        """The prompt's token ids; text counts one token for four bytes."""
        if chat:
            need(self.messages is not None, "messages must be a list of objects")
            text = "".join(str(message.get("content") or "") for message in self.messages)
            prompt = self.prompt_token_ids or text
        else:
            prompt = self.prompt
        need(prompt, "a prompt is needed: one text, or one list of token ids")
        if isinstance(prompt, list) and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list):
            return prompt
        data = prompt.encode()
        return [FIRST_TOKEN_ID + zlib.crc32(data[i : i + 4]) % TOKEN_IDS for i in range(0, len(data), 4)]


def need(holds, text: str, status: int = 400) -> None:
    """Answer {"error": text} with `status` unless the condition holds."""
    if not holds:
        raise STATUS[status](text=json.dumps({"error": text}), content_type="application/json")


async def read_body(request: web.Request, dialect: str, fault: str) -> tuple[dict, Body, list[int]]:
    """A request's body, the same checked, and its prompt's token ids; what is wrong is answered with 400."""
    try:
        body = json.loads(await request.read())
        asked = Body.model_validate(body)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]]
        need(False, "; ".join(wrong))
    except (ValueError, RecursionError) as error:
        need(False, f"body is not JSON: {error}")
    endpoint = "chat" if is_chat(request) else "completions"
    known = known_keys("request", "both") | known_keys("request", endpoint)
    strange = set(body) - (known - ({"detokenize"} if fault == "no_detokenize" else set()))
    params = known_keys("disaggregated_params", "both") | known_keys("disaggregated_params", dialect)
    strange |= set(body.get("disaggregated_params") or ()) - params
    need(not strange, f"unknown field {', '.join(sorted(strange))}: extra inputs are not permitted")
    need(asked.stream or asked.stream_options is None, "stream_options needs stream: true")
    return body, asked, asked.tokens(is_chat(request))


def is_chat(request: web.Request) -> bool:
    """Whether the request came by the chat endpoint."""
    return request.path == ENDPOINTS[1]


def compact(value) -> bytes:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


class Answer:
    """The bytes of one answer: parts that do not change are made once, a token costs one formatting.

    As the real one's post-processors write it: ids take the place of text where a completion says `detokenize: false`;
    chat has none. The end token has no text. The last usage is an event of chat, on completions, too.
    """

    def __init__(self, number: int, asked: Body, chat: bool, dialect: str, checksum: int, finish: str):
        self.chat, self.checksum, self.finish = chat, checksum, finish
        self.gives_ids = not chat and not asked.detokenize
        self.first_token = FIRST_TOKEN_ID + checksum % TOKEN_IDS
        options = asked.stream_options
        self.include_usage = bool(options and options.include_usage)
        everywhere = options and options.continuous_usage_stats
        everywhere = dialect == "v5.1" if everywhere is None else everywhere
        self.usage_everywhere = self.include_usage and everywhere
        told = {"created": int(time.time()), "model": asked.model}
        chunk = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", **told}
        text = {"id": f"cmpl-{number}", "object": "text_completion", **told}
        self.head = {**chunk, "object": "chat.completion"} if chat else text
        self.event = b"data: " + compact(chunk if chat else self.head)[:-1] + b',"choices":['
        self.last_event = b"data: " + compact(chunk)[:-1] + b',"choices":['
        self.piece = b'{"index":0,' + (b'"delta":{"content":"%b"}' if chat else b'"text":"%b","token_ids":%b')
        self.piece += b',"logprobs":null,"finish_reason":%b,"stop_reason":null}]'

    def token(self, position: int, last: bool = False) -> int:
        """The id of the token at `position`, counted from 0."""
        if last and self.finish == "stop":
            return END_TOKEN
        if position == 0:
            return self.first_token
        return FIRST_TOKEN_ID + (self.checksum + position * 7919) % TOKEN_IDS

    def frame(self, sequence: Sequence) -> bytes:
        """The HTTP chunk for the token just emitted; with the last one also usage and [DONE]."""
        count, last = sequence.emitted, sequence.emitted == sequence.output_tokens
        token = self.token(count - 1, last)
        text = b"" if self.gives_ids or token == END_TOKEN else b" t%d" % token
        finish = b'"%b"' % self.finish.encode() if last else b"null"
        ids = b"[%d]" % token if self.gives_ids else b"null"
        data = self.event + self.piece % ((text, finish) if self.chat else (text, ids, finish))
        if self.usage_everywhere:
            data += b',"usage":' + compact(usage_of(sequence, count))
        data += b"}\n\n"
        if self.chat and count == 1:
            role = b'{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]} \n\n'
            data = self.event + role + data
        if last:
            if self.include_usage:
                data += self.last_event + b'],"usage":' + compact(usage_of(sequence, count)) + b"}\n\n"
            data += DONE
        return b"%x\r\n%b\r\n" % (len(data), data)

    def half_frame(self, sequence: Sequence) -> bytes:
        """Like `frame`, but the connection closes half way (fault truncated_stream)."""
        if sequence.emitted <= sequence.output_tokens // 2:
            return self.frame(sequence)
        sequence.transport.close()
        return b""

    def whole(self, sequence: Sequence, params: dict | None = None) -> dict:
        """The non-streaming body; params are what a context server hands on."""
        count = sequence.output_tokens
        ids = [self.token(i, i == count - 1) for i in range(count)]
        text = "".join(f" t{i}" for i in ids if i != END_TOKEN)
        content = {"text": "", "token_ids": ids} if self.gives_ids else {"text": text, "token_ids": None}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self.finish, "stop_reason": None}
        choice |= {"disaggregated_params": params}
        return {**self.head, "choices": [choice], "usage": usage_of(sequence, count)}


def usage_of(sequence: Sequence, completion: int) -> dict:
    """The usage object of an answer, or of its first `completion` tokens."""
    prompt = sequence.input_tokens
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


async def begin_stream(request: web.Request) -> web.StreamResponse:
    """Send the head of a chunked event stream."""
    response = web.StreamResponse(headers=EVENT_STREAM)
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response
