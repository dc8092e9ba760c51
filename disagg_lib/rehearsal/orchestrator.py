"""The orchestrator: a context server, then a generation server, for each request."""

import asyncio
import itertools
import time
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from ..errors import DisaggError
from ..serving import rules
from .answers import begin_stream, compact, is_chat, need, read_body
from .configuration import ServeFile
from .knobs import log


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
