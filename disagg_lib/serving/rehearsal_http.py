"""The HTTP side of the rehearsal: a worker (context or generation server) and the orchestrator, on aiohttp.

Messages follow TensorRT-LLM's OpenAI-compatible servers; the differences are listed by `python -m disagg_lib.serving.rehearsal --help`.
"""

import asyncio
import base64
import itertools
import json
import os
import signal
import socket
import sys
import time
import zlib
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from disagg_lib import __name__ as package
from disagg_lib.errors import DisaggError
from disagg_lib.serving import rules
from disagg_lib.serving.engine import ContextEngine, GenerationEngine, Sequence
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.lengths import output_tokens_at
from disagg_lib.serving.rehearsal import Knobs, log
from disagg_lib.serving.serve_config import EngineArgs, ServeFile, known_keys

FIRST_TOKEN_ID, TOKEN_IDS = 1000, 4096
LOAD_S = 1.5
ENDPOINTS = {"/v1/completions": False, "/v1/chat/completions": True}


class BadRequest(Exception):
    """A body that is answered with 400."""


@dataclass(frozen=True)
class Prompt:
    """What a request asks for, as far as the serving model cares."""

    tokens: list[int]
    max_tokens: int | None
    min_tokens: int
    stream: bool
    include_usage: bool


def _whole(body: dict, key: str, least: int, default):
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadRequest(f"{key} is {value!r}; a whole number of at least {least} is needed")
    return value


def _prompt_tokens(prompt) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        data = prompt.encode()
        return [FIRST_TOKEN_ID + zlib.crc32(data[i : i + 4]) % TOKEN_IDS for i in range(0, len(data), 4)]
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    raise BadRequest("prompt must be one non-empty string or one non-empty list of token ids")


def _first_tokens(params: dict) -> bool:
    tokens = params.get("first_gen_tokens")
    return isinstance(tokens, list) and bool(tokens) and all(type(token) is int for token in tokens)


def parse_body(raw: bytes, chat: bool) -> tuple[dict, Prompt]:
    """Check a request body as the servers' data classes do.

    Raises
    ------
    BadRequest : not JSON, an unknown field, a wrong type, several choices or several prompts.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object")
    unknown = sorted(set(body) - known_keys("request"))
    if unknown:
        raise BadRequest(f"unknown field {', '.join(unknown)}")
    if not isinstance(body.get("model"), str):
        raise BadRequest("model is needed")
    if _whole(body, "n", 1, 1) != 1 or _whole(body, "best_of", 1, 1) != 1:
        raise BadRequest("several choices are not supported")
    stream, options = body.get("stream", False), body.get("stream_options")
    if not isinstance(stream, bool) or not isinstance(options, dict | None):
        raise BadRequest("stream must be true or false, stream_options an object")
    if not isinstance(body.get("disaggregated_params"), dict | None):
        raise BadRequest("disaggregated_params must be an object")
    if options is not None and not stream:
        raise BadRequest("stream_options needs stream: true")
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise BadRequest("messages must be a list of objects")
        tokens = body.get("prompt_token_ids")
        if tokens is None:
            tokens = "".join(str(m.get("content") or "") for m in messages)
        prompt = _prompt_tokens(tokens)
    else:
        prompt = _prompt_tokens(body.get("prompt"))
    most = _whole(body, "max_completion_tokens", 1, None) or _whole(
        body, "max_tokens", 1, None if chat else 16
    )
    least = _whole(body, "min_tokens", 0, 0)
    return body, Prompt(prompt, most, least, stream, bool((options or {}).get("include_usage")))


def error_response(status: int, text: str) -> web.Response:
    """{"error": text}, as the servers answer."""
    return web.json_response({"error": text}, status=status)


class Answer:
    """The bytes of one answer: parts that do not change are made once, a token costs one formatting."""

    def __init__(self, number: int, model: str, chat: bool, checksum: int, first_token: int, finish: str):
        self.chat, self.checksum, self.first_token, self.finish = chat, checksum, first_token, finish
        self.include_usage = False
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {"id": f"{prefix}-{number}", "object": kind, "created": int(time.time()), "model": model}
        head = {**self.head, "object": "chat.completion.chunk"} if chat else self.head
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
                usage = compact(usage_of(sequence.input_tokens, sequence.emitted))
                data += self.event + b'],"usage":' + usage + b"}\n\n"
            data += b"data: [DONE]\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)

    def whole(self, prompt_tokens: int, count: int, extra: dict) -> dict:
        """The non-streaming body with `count` tokens; `extra` goes into the choice."""
        ids = [self.token(i) for i in range(count)]
        text = "".join(f" t{i}" for i in ids)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {
            "index": 0,
            **content,
            "token_ids": ids,
            "logprobs": None,
            "finish_reason": self.finish,
            **extra,
        }
        return {**self.head, "choices": [choice], "usage": usage_of(prompt_tokens, count)}


def compact(value) -> bytes:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict:
    """The usage object of an answer."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Worker:
    """One context or generation server (or, with no role given, whichever a request needs)."""

    def __init__(self, name, role, model, args: EngineArgs, dialect: str, knobs: Knobs):
        self.name, self.role, self.model, self.args, self.knobs = name, role, model, args, knobs
        self.dialect = dialect
        self.table = read_table(knobs.system, args.tp, args.pp)
        self.numbers = itertools.count(1)
        self.served = 0
        scale = knobs.time_scale / 1000

        def log_iteration(text):
            log(name, text)

        self.context = ContextEngine(args, self.table, scale, log_iteration)
        self.generation = GenerationEngine(args, self.table, scale, log_iteration)
        if knobs.fault == "slow_tokens":
            self.generation.slowdown = 20.0
        # Both run on one clock, as a server has one; a server with a role uses one of them.
        self.engines = {"context": [self.context], "generation": [self.generation]}.get(
            role, [self.context, self.generation]
        )

    async def load(self) -> None:
        """Take the time that loading takes, and crash in the middle if told to."""
        a = self.args
        log(self.name, f"loading {self.model}: TP{a.tp} PP{a.pp}, max_batch_size {a.max_batch_size},"
            f" max_num_tokens {a.max_num_tokens}, max_seq_len {a.max_seq_len}")  # fmt: skip
        for part in range(1, 4):
            await asyncio.sleep(LOAD_S * self.knobs.time_scale / 3)
            log(self.name, f"loading weights: {part}/3")
            if part == 2 and self.knobs.fault == "crash_loading" and self.knobs.fault_server == self.name:
                self._crash("CUDA out of memory while loading weights (fault crash_loading)")
        log(self.name, f"KV cache: {self.generation.kv_capacity} tokens at {a.kv_fraction} of free memory;"
            f" CUDA graphs: {list(a.graph_sizes) or 'off'}")  # fmt: skip

    def _crash(self, reason: str) -> None:
        log(self.name, f"[E] {reason}")
        os._exit(1)

    def _counted(self) -> None:
        self.served += 1
        k = self.knobs
        if k.fault == "crash_midrun" and k.fault_server == self.name and self.served > k.fault_count:
            self._crash(f"executor worker died after {k.fault_count} requests (fault crash_midrun)")

    def _check_length(self, prompt: Prompt) -> int:
        """Room for new tokens, or BadRequest as the engine refuses the prompt."""
        count = len(prompt.tokens)
        if count >= self.args.max_seq_len:
            raise BadRequest(f"prompt has {count} tokens; max_seq_len is {self.args.max_seq_len}")
        room = self.args.max_seq_len - count
        return min(prompt.max_tokens or room, room)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        chat = ENDPOINTS[request.path]
        try:
            body, prompt = parse_body(await request.read(), chat)
            params = body.get("disaggregated_params") or {}
            kind = params.get("request_type")
            role = {"context_only": "context", "generation_only": "generation"}.get(kind)
            if role is None or self.role not in (None, role):
                raise BadRequest(
                    f"{self.name} is a {self.role or 'context or generation'} server and got request_type {kind!r}"
                )
            if not self.args.transport:
                return error_response(500, "KV transfer is off: cache_transceiver_config.backend is not set")
            most = self._check_length(prompt)
            if role == "context":
                if not self.args.chunked and len(prompt.tokens) > self.args.max_num_tokens:
                    raise BadRequest(
                        f"prompt has {len(prompt.tokens)} tokens, max_num_tokens is {self.args.max_num_tokens}"
                        " and enable_chunked_prefill is off"
                    )
            elif not _first_tokens(params) or "ctx_request_id" not in params:
                raise BadRequest(
                    "generation_only needs disaggregated_params with ctx_request_id and first_gen_tokens"
                )
        except BadRequest as error:
            return error_response(400, str(error))
        self._counted()
        checksum = zlib.crc32(repr(prompt.tokens).encode())
        if role == "context":
            return await self._context(prompt, chat, checksum)
        return await self._generation(request, prompt, chat, checksum, params, most)

    async def _context(self, prompt: Prompt, chat: bool, checksum: int) -> web.Response:
        sequence = Sequence(len(prompt.tokens), 1)
        self.context.submit(sequence)
        await sequence.done.wait()
        number = next(self.numbers)
        answer = Answer(number, self.model, chat, checksum, FIRST_TOKEN_ID + checksum % TOKEN_IDS, "length")
        state = json.dumps({"server": self.name, "gpus": self.args.tp * self.args.pp}).encode()
        params = {
            "request_type": "context_only",
            "first_gen_tokens": [answer.first_token],
            "ctx_request_id": number,
            "encoded_opaque_state": base64.b64encode(state).decode(),
            "draft_tokens": None,
        }
        content = answer.whole(sequence.input_tokens, 1, {"disaggregated_params": params})
        return web.json_response({**content, "prompt_token_ids": prompt.tokens})

    def _output_tokens(self, prompt: Prompt, checksum: int, most: int) -> int:
        if prompt.min_tokens >= most:
            return most
        return min(most, max(prompt.min_tokens, 1, output_tokens_at(checksum / 2**32)))

    def _transfer_s(self, tokens: int, params: dict) -> float:
        try:
            gpus = json.loads(base64.b64decode(params.get("encoded_opaque_state") or ""))["gpus"]
        except (ValueError, KeyError, TypeError):
            gpus = self.args.tp * self.args.pp
        pairs = min(gpus, self.args.tp * self.args.pp)
        size = self.table.kv_bytes_per_token * self.args.tp * self.args.pp
        return (
            self.knobs.time_scale
            * rules.transfer_ms(
                tokens, size, rules.TRANSFER_GB_PER_S_PER_GPU * pairs, rules.TRANSFER_FIXED_MS
            )
            / 1000
        )

    async def _generation(self, request, prompt: Prompt, chat, checksum, params, most) -> web.StreamResponse:
        sequence = Sequence(len(prompt.tokens), self._output_tokens(prompt, checksum, most))
        need = rules.kv_tokens(sequence.input_tokens, sequence.output_tokens, rules.KV_BLOCK_TOKENS)
        if need > self.generation.kv_capacity:
            return error_response(
                500, f"the request needs {need} KV-cache tokens; there are {self.generation.kv_capacity}"
            )
        sequence.transfer_s = self._transfer_s(sequence.input_tokens, params)
        finish = "length" if sequence.output_tokens == most else "stop"
        answer = Answer(next(self.numbers), self.model, chat, checksum, params["first_gen_tokens"][0], finish)
        answer.include_usage = prompt.include_usage
        if not prompt.stream:
            self.generation.submit(sequence)
            await sequence.done.wait()
            return web.json_response(answer.whole(sequence.input_tokens, sequence.emitted, {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        sequence.transport, sequence.frame = request.transport, answer.frame
        if sequence.transport is None:
            return response
        if self.knobs.fault == "no_tokens":
            await asyncio.Event().wait()
        if self.knobs.fault == "truncated_stream" and self.served % self.knobs.fault_count == 0:
            sequence.frame = self._cutting(answer)
        self.generation.submit(sequence)
        await sequence.done.wait()
        if not sequence.transport.is_closing():
            await response.write_eof()
        return response

    def _cutting(self, answer: Answer):
        """A frame maker that closes the connection half way through the answer."""

        def frame(sequence: Sequence) -> bytes:
            if sequence.emitted > sequence.output_tokens // 2:
                sequence.transport.close()
                return b""
            return answer.frame(sequence)

        return frame

    async def health(self, request) -> web.Response:
        """GET /health."""
        return web.Response(status=503 if self.knobs.fault == "health_503" else 200)

    async def metrics(self, request) -> web.Response:
        """GET /metrics: the iteration stats since the last reading."""
        stats = [s for engine in self.engines for s in engine.stats]
        for engine in self.engines:
            engine.stats.clear()
        return web.json_response(stats)

    async def models(self, request) -> web.Response:
        """GET /v1/models."""
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": package}
        return web.json_response({"object": "list", "data": [entry]})


class Orchestrator:
    """Takes requests to a context server, then to a generation server, and passes the answer's bytes through."""

    def __init__(self, file: ServeFile, request_timeout_s: float):
        self.file = file
        self.timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self.attempts = file.max_retries if file.dialect == "v5.1" else file.max_retries + 1
        self.servers = {r: [i for i in file.instances if i.role == r] for r in ("context", "generation")}
        self.loads = {role: [0] * len(servers) for role, servers in self.servers.items()}
        self.turns = dict.fromkeys(self.servers, 0)
        self.session: aiohttp.ClientSession | None = None

    async def wait_for_workers(self, timeout_s: float) -> None:
        """Poll every worker's /health until all answer 200."""
        deadline = time.monotonic() + timeout_s
        missing = list(self.file.instances)
        while missing:
            checks = await asyncio.gather(*(self._healthy(i) for i in missing))
            missing = [i for i, well in zip(missing, checks, strict=True) if not well]
            if missing and time.monotonic() > deadline:
                names = ", ".join(f"{i.name} ({i.host}:{i.port})" for i in missing)
                raise DisaggError(
                    f"orchestrator: no health from {names} within {timeout_s:g} s (-t); see the workers' log."
                )
            if missing:
                await asyncio.sleep(0.2)

    async def _healthy(self, instance) -> bool:
        try:
            url = f"http://{instance.host}:{instance.port}/health"
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _route(self, role: str, prompt: Prompt) -> tuple[int, int]:
        """Index of the server to use and the load it now carries more."""
        kind, use_tokens = self.file.routers[role]
        turn = self.turns[role]
        self.turns[role] += 1
        load = len(prompt.tokens) if use_tokens else 1
        loads = self.loads[role]
        index = rules.least_loaded(loads, turn) if kind == "load_balancing" else turn % len(loads)
        loads[index] += load
        return index, load

    async def _post(self, instance, path: str, body: dict) -> aiohttp.ClientResponse:
        """POST with the release's retries, 1 s apart; raises the last failure."""
        data = compact(body)
        url = f"http://{instance.host}:{instance.port}{path}"
        for attempt in range(self.attempts):
            try:
                answer = await self.session.post(
                    url, data=data, headers={"Content-Type": "application/json"}, timeout=self.timeout
                )
                if answer.status < 400:
                    return answer
                text = await answer.text()
                raise aiohttp.ClientError(f"{instance.name} answered {answer.status}: {text[:300]}")
            except (aiohttp.ClientError, OSError) as error:
                log(
                    "orchestrator",
                    f"[E] {instance.name}{path}, attempt {attempt + 1}: {error or type(error).__name__}",
                )
                if attempt + 1 == self.attempts or isinstance(error, TimeoutError):
                    raise
                await asyncio.sleep(1)
        raise AssertionError("unreachable")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        chat = ENDPOINTS[request.path]
        try:
            body, prompt = parse_body(await request.read(), chat)
        except BadRequest as error:
            return error_response(400, str(error))
        try:
            return await self._disaggregated(request, chat, body, prompt)
        except (aiohttp.ClientError, OSError) as error:
            if self.file.dialect == "v5.1":
                return error_response(429, "Too many requests")
            return error_response(500, f"Internal server error {error}")

    async def _disaggregated(self, request, chat: bool, body: dict, prompt: Prompt) -> web.StreamResponse:
        index, load = self._route("context", prompt)
        try:
            ask = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
            ask |= {"stream": False, "disaggregated_params": {"request_type": "context_only"}}
            async with await self._post(self.servers["context"][index], request.path, ask) as answer:
                context = await answer.json()
        finally:
            self.loads["context"][index] -= load
        choice = context["choices"][0]
        if choice["finish_reason"] not in ("length", "not_finished"):
            if not prompt.stream:
                return web.json_response(context)
            return web.Response(body=b"data: [DONE]\n\n", content_type="text/event-stream")
        params = {**choice["disaggregated_params"], "request_type": "generation_only"}
        ask = {**body, "disaggregated_params": params}
        ask["prompt_token_ids" if chat else "prompt"] = context["prompt_token_ids"]
        index, load = self._route("generation", prompt)
        try:
            async with await self._post(self.servers["generation"][index], request.path, ask) as answer:
                if not prompt.stream:
                    return web.json_response(body=await answer.read())
                return await self._pass_through(request, answer)
        finally:
            self.loads["generation"][index] -= load

    async def _pass_through(self, request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async for data in answer.content.iter_any():
                await response.write(data)
        except (aiohttp.ClientError, OSError) as error:
            # The status is sent: all that is left is to end the stream without [DONE].
            log("orchestrator", f"[E] stream broke: {error or type(error).__name__}")
            if request.transport is not None:
                request.transport.abort()
            return response
        await response.write_eof()
        return response


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


async def _listen(routes: list, host: str, port: int) -> None:
    refuse_foreign_host(host)
    app = web.Application(client_max_size=2**26)
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise DisaggError(
            f"{host}:{port}: cannot listen ({error}). Is another server on it, or is it another node's name?"
        ) from None


def _run(serve) -> None:
    """Run serve() until SIGTERM or SIGINT, which end the process at once; on uvloop where present."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        work = asyncio.create_task(serve())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            sys.stdout.flush()
            os._exit(0)  # open streams are cut, as a server that is told to end cuts them
        work.result()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def run_server(
    name, role, host: str, port: int, model: str, args: EngineArgs, dialect: str, knobs: Knobs
) -> None:
    """Load, listen on host:port, serve until signalled."""

    async def serve() -> None:
        worker = Worker(name, role, model, args, dialect, knobs)
        await worker.load()
        routes = [web.post(path, worker.complete) for path in ENDPOINTS]
        routes += [web.get("/health", worker.health), web.get("/version", _version(dialect))]
        routes += [web.get("/metrics", worker.metrics), web.get("/v1/models", worker.models)]
        await _listen(routes, host, port)
        log(name, f"ready on http://{host}:{port}")
        await asyncio.gather(*(engine.run() for engine in worker.engines))

    _run(serve)


def run_orchestrator(file: ServeFile, start_timeout_s: float, request_timeout_s: float) -> None:
    """Wait for the workers, listen on hostname:port, serve until signalled."""

    async def serve() -> None:
        orchestrator = Orchestrator(file, request_timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as orchestrator.session:
            log("orchestrator", f"waiting for {len(file.instances)} servers")
            await orchestrator.wait_for_workers(start_timeout_s)
            routes = [web.post(path, orchestrator.complete) for path in ENDPOINTS]
            routes += [web.get("/health", _well), web.get("/version", _version(file.dialect))]
            await _listen(routes, file.hostname, file.port)
            log("orchestrator", f"ready on http://{file.hostname}:{file.port}")
            await asyncio.Event().wait()

    _run(serve)


async def _well(request) -> web.Response:
    return web.Response()


def _version(dialect: str):
    async def version(request) -> web.Response:
        return web.json_response({"version": f"rehearsal of {dialect}"})

    return version
