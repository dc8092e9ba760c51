"""The HTTP side of the rehearsal: a worker (context or generation server) and the orchestrator, on aiohttp.

Messages follow TensorRT-LLM's OpenAI-compatible servers; the differences are listed by `python -m disagg_lib.serving.rehearsal --help`.
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
import time
import zlib
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Literal

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from disagg_lib.errors import DisaggError
from disagg_lib.serving import rules
from disagg_lib.serving.engine import ContextEngine, GenerationEngine, Sequence
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.lengths import output_tokens_at
from disagg_lib.serving.rehearsal import Knobs, log
from disagg_lib.serving.serve_config import EngineArgs, ServeFile, known_keys

FIRST_TOKEN_ID, TOKEN_IDS = 1000, 4096
LOAD_S = 1.5
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


class Worker:
    """One context or generation server."""

    def __init__(self, name: str, role: str, model: str, args: EngineArgs, knobs: Knobs):
        self.name, self.role, self.model, self.args, self.knobs = name, role, model, args, knobs
        self.table = read_table(knobs.system, args.tp, args.pp)
        self.numbers = itertools.count(1)
        self.served = 0
        engine = ContextEngine if role == "context" else GenerationEngine
        self.engine = engine(args, self.table, knobs.time_scale / 1000, partial(log, name))
        self.kv_capacity = self.table.kv_capacity_tokens(args.kv_fraction, args.max_num_tokens)
        if knobs.fault == "slow_tokens":
            self.engine.slowdown = 20.0  # of generation steps only

    async def load(self) -> None:
        """Take the time that loading takes, and crash in the middle if told to."""
        a = self.args
        log(self.name, f"loading {self.model}: TP{a.tp} PP{a.pp}, max_batch_size {a.max_batch_size},"
            f" max_num_tokens {a.max_num_tokens}, max_seq_len {a.max_seq_len}")  # fmt: skip
        for part in range(1, 4):
            await asyncio.sleep(LOAD_S * self.knobs.time_scale / 3)
            log(self.name, f"loading weights: {part}/3")
            if part == 2:
                self._crash_if("crash_loading", "CUDA out of memory while loading weights")
        log(self.name, f"KV cache: {self.kv_capacity} tokens at {a.kv_fraction} of free memory;"
            f" CUDA graphs: {list(a.graph_sizes) or 'off'}")  # fmt: skip

    def _crash_if(self, fault: str, reason: str) -> None:
        if (self.knobs.fault, self.knobs.fault_server) == (fault, self.name):
            log(self.name, f"[E] {reason} (fault {fault})")
            os._exit(1)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        _, asked, tokens = await read_body(request)
        params, args, chat = asked.disaggregated_params or DisaggregatedParams(), self.args, is_chat(request)
        need(
            params.request_type == f"{self.role}_only",
            f"{self.name} is a {self.role} server and got request_type {params.request_type!r}",
        )
        need(args.transport, "KV transfer is off: cache_transceiver_config.backend is not set", 500)
        room = args.max_seq_len - len(tokens)
        need(room > 0, f"prompt has {len(tokens)} tokens; max_seq_len is {args.max_seq_len}")
        need(
            self.role == "generation" or args.chunked or len(tokens) <= args.max_num_tokens,
            f"prompt has {len(tokens)} tokens, max_num_tokens is {args.max_num_tokens} and enable_chunked_prefill is off",
        )
        need(
            self.role == "context" or (params.first_gen_tokens and params.ctx_request_id is not None),
            "generation_only needs disaggregated_params with ctx_request_id and first_gen_tokens",
        )
        self.served += 1
        if self.served > self.knobs.fault_count:
            self._crash_if("crash_midrun", f"executor worker died after {self.served - 1} requests")
        most = min(room, asked.max_completion_tokens or asked.max_tokens or (room if chat else 16))
        checksum = zlib.crc32(repr(tokens).encode())
        if self.role == "context":
            return await self._context(tokens, chat, checksum)
        return await self._generation(request, asked, tokens, checksum, params, most)

    async def _context(self, tokens: list[int], chat: bool, checksum: int) -> web.Response:
        sequence = Sequence(len(tokens), 1)
        self.engine.submit(sequence)
        await sequence.done.wait()
        number = next(self.numbers)
        answer = Answer(number, self.model, chat, checksum, "length")
        params = {
            "request_type": "context_only",
            "first_gen_tokens": [answer.first_token],
            "ctx_request_id": number,
            "encoded_opaque_state": str(self.args.tp * self.args.pp),
            "draft_tokens": None,
        }
        content = answer.whole(sequence, disaggregated_params=params)
        return web.json_response({**content, "prompt_token_ids": tokens})

    async def _generation(
        self, request, asked: Body, tokens: list[int], checksum: int, params: DisaggregatedParams, most: int
    ) -> web.StreamResponse:
        drawn = int(output_tokens_at(checksum / 2**32))
        sequence = Sequence(len(tokens), min(most, max(asked.min_tokens or 0, drawn)))
        kv_need = rules.kv_tokens(sequence.input_tokens, sequence.output_tokens)
        fits = kv_need <= self.kv_capacity
        need(fits, f"the request needs {kv_need} KV-cache tokens; there are {self.kv_capacity}", 500)
        gpus = self.args.tp * self.args.pp
        moved_ms = rules.transfer_ms(len(tokens), int(params.encoded_opaque_state or gpus), gpus)
        sequence.transfer_s = self.knobs.time_scale * moved_ms / 1000
        finish = "length" if sequence.output_tokens == most else "stop"
        usage = bool((asked.stream_options or {}).get("include_usage"))
        answer = Answer(next(self.numbers), self.model, is_chat(request), checksum, finish, usage)
        answer.first_token = params.first_gen_tokens[0]
        if not asked.stream:
            self.engine.submit(sequence)
            await sequence.done.wait()
            return web.json_response(answer.whole(sequence))
        response = await begin_stream(request)
        sequence.transport, sequence.frame = request.transport, answer.frame
        if sequence.transport is None:  # the client has gone
            return response
        if self.knobs.fault == "no_tokens":
            await asyncio.Event().wait()
        if self.knobs.fault == "truncated_stream" and self.served % self.knobs.fault_count == 0:
            sequence.frame = answer.half_frame
        self.engine.submit(sequence)
        await sequence.done.wait()
        if not sequence.transport.is_closing():
            await response.write_eof()
        return response

    async def health(self, request) -> web.Response:
        """GET /health."""
        return web.Response(status=503 if self.knobs.fault == "health_503" else 200)


async def begin_stream(request: web.Request) -> web.StreamResponse:
    """Send the head of a chunked event stream."""
    response = web.StreamResponse(headers=EVENT_STREAM)
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


class Orchestrator:
    """Takes requests to a context server, then to a generation server, and passes the answer's bytes through."""

    def __init__(self, file: ServeFile, request_timeout_s: float):
        self.file = file
        self.timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self.attempts = file.max_retries if file.dialect == "v5.1" else file.max_retries + 1
        self.servers = {r: [i for i in file.instances if i.role == r] for r in file.routers}
        self.loads = {role: [0] * len(servers) for role, servers in self.servers.items()}
        self.turns = {role: itertools.count() for role in self.servers}
        self.session: aiohttp.ClientSession | None = None

    async def wait_for_workers(self, timeout_s: float) -> None:
        """Poll every worker's /health until all answer 200."""
        deadline = time.monotonic() + timeout_s
        missing = list(self.file.instances)
        while True:
            well = await asyncio.gather(*map(self._healthy, missing))
            missing = list(itertools.compress(missing, (not w for w in well)))
            if not missing:
                return
            if time.monotonic() > deadline:
                names = ", ".join(f"{i.name} ({i.host}:{i.port})" for i in missing)
                raise DisaggError(
                    f"orchestrator: no health from {names} within {timeout_s:g} s (-t); see the workers' log."
                )
            await asyncio.sleep(0.2)

    async def _healthy(self, instance) -> bool:
        try:
            url = f"http://{instance.host}:{instance.port}/health"
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    @asynccontextmanager
    async def _answer(self, role: str, path: str, body: dict, tokens: list[int]):
        """The answer of the server that the router chooses, which is loaded with the request until the answer has been read."""
        kind, use_tokens = self.file.routers[role]
        turn, loads = next(self.turns[role]), self.loads[role]
        index = rules.least_loaded(loads, turn) if kind == "load_balancing" else turn % len(loads)
        load = len(tokens) if use_tokens else 1
        loads[index] += load
        try:
            async with await self._post(self.servers[role][index], path, body) as answer:
                yield answer
        finally:
            loads[index] -= load

    async def _post(self, instance, path: str, body: dict) -> aiohttp.ClientResponse:
        """POST with the release's retries, 1 s apart; raises the last failure."""
        url, headers = f"http://{instance.host}:{instance.port}{path}", {"Content-Type": "application/json"}
        for attempt in itertools.count(1):
            try:
                answer = await self.session.post(
                    url, data=compact(body), headers=headers, timeout=self.timeout
                )
                if answer.status < 400:
                    return answer
                text = await answer.text()
                raise aiohttp.ClientError(f"{instance.name} answered {answer.status}: {text[:300]}")
            except (aiohttp.ClientError, OSError) as error:
                what = error or type(error).__name__
                log("orchestrator", f"[E] {instance.name}{path}, attempt {attempt}: {what}")
                if attempt >= self.attempts or isinstance(error, TimeoutError):
                    raise
                await asyncio.sleep(1)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions: context server first, then a generation server."""
        body, asked, tokens = await read_body(request)
        question = {k: v for k, v in body.items() if k != "stream_options"}
        question |= {"stream": False, "disaggregated_params": {"request_type": "context_only"}}
        try:
            async with self._answer("context", request.path, question, tokens) as answer:
                context = await answer.json()
            params = {**context["choices"][0]["disaggregated_params"], "request_type": "generation_only"}
            prompt = "prompt_token_ids" if is_chat(request) else "prompt"
            question = {**body, "disaggregated_params": params, prompt: context["prompt_token_ids"]}
            async with self._answer("generation", request.path, question, tokens) as answer:
                if not asked.stream:
                    return web.json_response(body=await answer.read())
                return await self._pass_through(request, answer)
        except (aiohttp.ClientError, OSError) as error:
            if self.file.dialect == "v5.1":
                need(False, "Too many requests", 429)
            need(False, f"Internal server error {error}", 500)

    async def _pass_through(self, request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = await begin_stream(request)
        try:
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
        except (aiohttp.ClientError, OSError) as error:
            # The status is sent: all that is left is to end the stream without [DONE].
            log("orchestrator", f"[E] stream broke: {error or type(error).__name__}")
            if request.transport is not None:
                request.transport.abort()
        return response

    async def health(self, request) -> web.Response:
        """GET /health: always well, since the port opens only when every worker is."""
        return web.Response()


def refuse_foreign_host(host: str) -> None:
    """On a virtual test cluster all nodes share one network; a real one could not bind another node's address.

    Raises
    ------
    DisaggError : the step runs on another node than the one that `host` names.
    """
    node = os.environ.get("SLURMD_NODENAME")
    if node and socket.gethostbyname(host) != socket.gethostbyname(node):
        raise DisaggError(
            f"{host}: cannot listen: this step runs on {node}. Pin it to the node whose name it binds."
        )


async def _listen(server: Worker | Orchestrator, host: str, port: int, dialect: str) -> None:
    refuse_foreign_host(host)

    async def version(request) -> web.Response:
        return web.json_response({"version": f"rehearsal of {dialect}"})

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post(path, server.complete) for path in ENDPOINTS])
    app.add_routes([web.get("/health", server.health), web.get("/version", version)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        # A machine that is overloaded for seconds lets connections wait instead of resetting them (aiohttp's own: 128).
        await web.TCPSite(runner, host, port, backlog=4096).start()
    except OSError as error:
        raise DisaggError(
            f"{host}:{port}: cannot listen ({error}). Is another server on it, or is it another node's name?"
        ) from None


def _run(serving) -> None:
    """Run the coroutine until SIGTERM or SIGINT, which end the process at once; on uvloop where present."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None

    def end() -> None:
        sys.stdout.flush()
        os._exit(0)  # open streams are cut, as a server that is told to end cuts them

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for number in (signal.SIGTERM, signal.SIGINT):
            runner.get_loop().add_signal_handler(number, end)
        runner.run(serving)


def run_server(worker: Worker, host: str, port: int, dialect: str) -> None:
    """Load, listen on host:port, serve until signalled."""

    async def serve() -> None:
        await worker.load()
        await _listen(worker, host, port, dialect)
        log(worker.name, f"ready on http://{host}:{port}")
        await worker.engine.run()

    _run(serve())


def run_orchestrator(file: ServeFile, start_timeout_s: float, request_timeout_s: float) -> None:
    """Wait for the workers, listen on hostname:port, serve until signalled."""

    async def serve() -> None:
        orchestrator = Orchestrator(file, request_timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as orchestrator.session:
            log("orchestrator", f"waiting for {len(file.instances)} servers")
            await orchestrator.wait_for_workers(start_timeout_s)
            await _listen(orchestrator, file.hostname, file.port, file.dialect)
            log("orchestrator", f"ready on http://{file.hostname}:{file.port}")
            await asyncio.Event().wait()

    _run(serve())
