"""The orchestrator: a context server, then a generation server, for each request."""

import asyncio
import itertools
import time
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from ..errors import DisaggError
from ..serving import rules
from .answers import DONE, Body, begin_stream, compact, is_chat, need, read_body
from .configuration import ServeFile
from .knobs import Knobs, log

FIRST_REQUEST_ID = 1 << 42  # of 1.2's ids that both phases of a request share


class Refused(aiohttp.ClientError):
    """A server answered, but with a status of 400 or more."""


class Orchestrator:
    """Takes requests to a context server, then to a generation server, and passes the answer's bytes through."""

    def __init__(self, file: ServeFile, request_timeout_s: float, knobs: Knobs):
        self.file, self.dialect, self.fault = file, file.dialect, knobs.fault
        self.request_ids = itertools.count(FIRST_REQUEST_ID)
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
            missing = [instance for instance, is_well in zip(missing, well, strict=True) if not is_well]
            if not missing:
                return
            if time.monotonic() > deadline:
                names = ", ".join(f"{i.name} ({i.host}:{i.port})" for i in missing)
                late = f"no health from {names} within {timeout_s:g} s (-t)"
                raise DisaggError(f"orchestrator: {late}; see the workers' log.")
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
        """POST with the release's retries, 1 s apart, of a stream none; raises the last failure."""
        url, headers = f"http://{instance.host}:{instance.port}{path}", {"Content-Type": "application/json"}
        for attempt in itertools.count(1):
            try:
                data = compact(body)
                answer = await self.session.post(url, data=data, headers=headers, timeout=self.timeout)
                if answer.status < 400:
                    return answer
                text = await answer.text()
                raise Refused(f"{instance.name} answered {answer.status}: {text[:300]}")
            except (aiohttp.ClientError, OSError) as error:
                what = error or type(error).__name__
                log("orchestrator", f"[E] {instance.name}{path}, attempt {attempt}: {what}")
                if attempt >= self.attempts or body.get("stream") or isinstance(error, TimeoutError):
                    raise
                await asyncio.sleep(1)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions: context server first, then a generation server."""
        body, asked, tokens = await read_body(request, self.dialect, self.fault)
        if "max_tokens" in body and is_chat(request):  # an alias there, passed on by its own name
            body["max_completion_tokens"] = body.pop("max_tokens")
        shared = {} if self.dialect == "v5.1" else {"disagg_request_id": next(self.request_ids)}
        question = {**body, "stream": False, "stream_options": None}
        question["disaggregated_params"] = {"request_type": "context_only", **shared}
        try:
            async with self._answer("context", request.path, question, tokens) as answer:
                context = await answer.json()
            params = self._verified(context)
            if context["choices"][0]["finish_reason"] != "length":
                return await self._ended_at_once(request, asked, context)
            prompt = "prompt_token_ids" if is_chat(request) else "prompt"
            question = {**body, "disaggregated_params": {**params, "request_type": "generation_only"}}
            question[prompt] = context["prompt_token_ids"]
            if asked.stream:
                return await self._pass_through(request, question, tokens)
            async with self._answer("generation", request.path, question, tokens) as answer:
                return web.json_response(body=await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            if self.dialect == "v5.1":
                need(False, "Too many requests", 429)
            need(False, f"Internal server error {error}", 500)

    def _verified(self, context: dict) -> dict:
        """The params of a context server's answer; 500 without the ids that the release needs."""
        params = context["choices"][0]["disaggregated_params"] or {}
        ids = ("ctx_request_id",) if self.dialect == "v5.1" else ("ctx_request_id", "disagg_request_id")
        for name in ids:
            said = f"Invalid disaggregated params in context phase response. {name} is None"
            need(params.get(name) is not None, f"Internal server error {said}", 500)
        return params

    async def _ended_at_once(self, request, asked: Body, context: dict) -> web.StreamResponse:
        """The answer ended with its first token: no generation server is asked, and a stream has no token."""
        if not asked.stream:
            del context["choices"][0]["disaggregated_params"]
            return web.json_response(context)
        response = await begin_stream(request)
        await response.write(DONE)
        await response.write_eof()
        return response

    async def _pass_through(self, request, question: dict, tokens: list[int]) -> web.StreamResponse:
        """Begin the stream, then ask the generation server: whatever fails from here on finds 200 sent already."""
        response = await begin_stream(request)
        try:
            async with self._answer("generation", request.path, question, tokens) as answer:
                async for data in answer.content.iter_any():
                    await response.write(data)
            await response.write_eof()
        except (aiohttp.ClientError, OSError) as error:
            log("orchestrator", f"[E] stream broke: {error or type(error).__name__}")
            if self.dialect == "v5.1" and isinstance(error, Refused):
                await response.write_eof()  # its reader takes an answer that is no stream for an empty one
            elif request.transport is not None:
                request.transport.abort()
        return response

    async def health(self, request) -> web.Response:
        """GET /health: always well, since the port opens only when every worker is."""
        return web.Response()
