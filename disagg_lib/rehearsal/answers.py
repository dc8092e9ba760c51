"""Requests as the real server takes them, answers as it gives them."""

import json
import time
import zlib
from typing import Annotated, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from .configuration import known_keys
from .engine import Sequence

FIRST_TOKEN_ID, TOKEN_IDS = 1000, 4096

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
EVENT_STREAM = {"Content-Type": "text/event-stream"}
STATUS = {400: web.HTTPBadRequest, 429: web.HTTPTooManyRequests, 500: web.HTTPInternalServerError}

TokenIds = Annotated[list[NonNegativeInt], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class DisaggregatedParams(BaseModel):
    """What a context server hands on; its state holds the GPUs that the KV cache lies on."""

    model_config = ConfigDict(strict=True)
    request_type: str | None = None
    first_gen_tokens: TokenIds | None = None
    ctx_request_id: int | None = None
    encoded_opaque_state: str | None = Field(None, pattern=r"^[1-9]\d{0,5}$")


class Body(BaseModel):
    """What a request asks for, as far as the serving model cares; the names it may bear besides are in data/trtllm_keys.yaml."""

    model_config = ConfigDict(strict=True)
    model: str
    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=1)] | None = (
        None
    )
    messages: list[dict] | None = None
    prompt_token_ids: TokenIds | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    min_tokens: NonNegativeInt | None = None
    stream: bool = False
    stream_options: dict | None = None
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


async def read_body(request: web.Request) -> tuple[dict, Body, list[int]]:
    """A request's body, the same checked, and its prompt's token ids; what is wrong is answered with 400."""
    try:
        body = json.loads(await request.read())
        asked = Body.model_validate(body)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]]
        need(False, "; ".join(wrong))
    except (ValueError, RecursionError) as error:
        need(False, f"body is not JSON: {error}")
    unknown = sorted(set(body) - known_keys("request"))
    need(not unknown, f"unknown field {', '.join(unknown)}")
    need(asked.stream or asked.stream_options is None, "stream_options needs stream: true")
    return body, asked, asked.tokens(is_chat(request))


def is_chat(request: web.Request) -> bool:
    """Whether the request came by the chat endpoint."""
    return request.path == ENDPOINTS[1]


def compact(value) -> bytes:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


class Answer:
    """The bytes of one answer: parts that do not change are made once, a token costs one formatting."""

    def __init__(self, number: int, model: str, chat: bool, checksum: int, finish: str, usage: bool = False):
        self.chat, self.checksum, self.finish, self.include_usage = chat, checksum, finish, usage
        self.first_token = FIRST_TOKEN_ID + checksum % TOKEN_IDS
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self.head = {"id": f"{prefix}-{number}", "object": kind, "created": int(time.time()), "model": model}
        head = {**self.head, "object": kind + ".chunk"} if chat else self.head
        self.event = b"data: " + compact(head)[:-1] + b',"choices":['
        piece = b'"delta":{"content":" t%d"}' if chat else b'"text":" t%d"'
        self.piece = b'{"index":0,' + piece + b',"token_ids":[%d],"logprobs":null,"finish_reason":'

    def token(self, position: int) -> int:
        """The id of the token at `position`, counted from 0."""
        if position == 0:
            return self.first_token
        return FIRST_TOKEN_ID + (self.checksum + position * 7919) % TOKEN_IDS

    def frame(self, sequence: Sequence) -> bytes:
        """The HTTP chunk for the token just emitted; with the last one also usage and [DONE]."""
        token = self.token(sequence.emitted - 1)
        data = self.event + self.piece % (token, token)
        if self.chat and sequence.emitted == 1:
            role = b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
            data = self.event + role + b"]}\n\n" + data
        if sequence.emitted < sequence.output_tokens:
            data += b"null}]}\n\n"
        else:
            data += b'"%b"}]}\n\n' % self.finish.encode()
            if self.include_usage:
                data += self.event + b'],"usage":' + compact(usage_of(sequence)) + b"}\n\n"
            data += b"data: [DONE]\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)

    def half_frame(self, sequence: Sequence) -> bytes:
        """Like `frame`, but the connection closes half way (fault truncated_stream)."""
        if sequence.emitted <= sequence.output_tokens // 2:
            return self.frame(sequence)
        sequence.transport.close()
        return b""

    def whole(self, sequence: Sequence, **extra) -> dict:
        """The non-streaming body; `extra` goes into the choice."""
        ids = [self.token(i) for i in range(sequence.output_tokens)]
        text = "".join(f" t{i}" for i in ids)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "token_ids": ids, "logprobs": None, "finish_reason": self.finish}
        return {**self.head, "choices": [{**choice, **extra}], "usage": usage_of(sequence)}


def usage_of(sequence: Sequence) -> dict:
    """The usage object of an answer."""
    prompt, completion = sequence.input_tokens, sequence.output_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def begin_stream(request: web.Request) -> web.StreamResponse:
    """Send the head of a chunked event stream."""
    response = web.StreamResponse(headers=EVENT_STREAM)
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response
