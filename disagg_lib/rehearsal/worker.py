"""A context or generation server."""

import asyncio
import itertools
import os
import zlib
from functools import partial

from aiohttp import web

from ..serving import rules
from ..serving.latency import read_table
from ..serving.lengths import output_tokens_at
from ..serving.stacks import read_stack
from .answers import END_TOKEN, Answer, Body, DisaggregatedParams, begin_stream, is_chat, need, read_body
from .configuration import EngineArgs
from .engine import ContextEngine, GenerationEngine, Sequence
from .knobs import Knobs, log

LOAD_S = 1.5
# Of so many answers whose length is free, one is a token and the end token, as question answering has them.
SHORT_EVERY = 32


class Worker:
    """One context or generation server."""

    def __init__(self, name: str, role: str, model: str, args: EngineArgs, knobs: Knobs, dialect: str):
        self.name, self.role, self.model, self.args, self.knobs = name, role, model, args, knobs
        self.dialect, self.fault = dialect, knobs.fault_of(name)
        self.stack = read_stack(knobs.stack)
        self.table = read_table(knobs.system, args.tp, args.pp).under(self.stack)
        self.numbers = itertools.count(1)
        self.served = 0
        engine = ContextEngine if role == "context" else GenerationEngine
        self.engine = engine(args, self.table, knobs.time_scale / 1000, partial(log, name))
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
        log(self.name, f"KV cache: {self.engine.kv_capacity} tokens at {a.kv_fraction} of free memory;"
            f" CUDA graphs: {list(a.graph_sizes) or 'off'}")  # fmt: skip

    def _crash_if(self, fault: str, reason: str) -> None:
        if self.fault.removesuffix("_quiet") == fault:
            log(self.name, f"[E] Failed to initialize executor on rank 0: {reason} (fault {self.fault})")
            print("Traceback (most recent call last):", flush=True)
            print("RuntimeError: Executor worker returned error", flush=True)
            os._exit(1)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        _, asked, tokens = await read_body(request, self.dialect, self.knobs.fault)
        params, args, chat = asked.disaggregated_params or DisaggregatedParams(), self.args, is_chat(request)
        fits = params.request_type == f"{self.role}_only"
        need(fits, f"{self.name} is a {self.role} server and got request_type {params.request_type!r}")
        need(args.transport, "KV transfer is off: cache_transceiver_config.backend is not set", 500)
        room = args.max_seq_len - len(tokens)
        need(room > 0, f"prompt has {len(tokens)} tokens; max_seq_len is {args.max_seq_len}")
        need(
            self.role == "generation" or args.chunked or len(tokens) <= args.max_num_tokens,
            f"prompt has {len(tokens)} tokens, max_num_tokens is {args.max_num_tokens} and enable_chunked_prefill is off",
        )
        whole = self.role == "context" or (params.first_gen_tokens and params.ctx_request_id is not None)
        need(whole, "generation_only needs disaggregated_params with ctx_request_id and first_gen_tokens")
        self.served += 1
        if self.served > self.knobs.fault_count:
            self._crash_if("crash_midrun", f"executor worker died after {self.served - 1} requests")
            if self.fault == "gen_refuses":
                log(self.name, "[E] the executor takes no request any more (fault gen_refuses)")
                need(False, "the executor takes no request any more")
        checksum = zlib.crc32(repr(tokens).encode())
        if self.role == "context":
            return await self._context(asked, tokens, chat, checksum)
        most = min(room, asked.max_completion_tokens or asked.max_tokens or (room if chat else 16))
        return await self._generation(request, asked, tokens, checksum, params, most)

    async def _context(self, asked: Body, tokens: list[int], chat: bool, checksum: int) -> web.Response:
        sequence = Sequence(len(tokens), 1)
        await asyncio.sleep(self.knobs.time_scale * self.stack.ttft_ms / 1000)
        await self.engine.serve(sequence)
        number = next(self.numbers)
        ends = self.knobs.fault == "eos_first" and self.served % self.knobs.fault_count == 0
        answer = Answer(number, asked, chat, self.dialect, checksum, "stop" if ends else "length")
        params = {
            "request_type": "context_only",
            "first_gen_tokens": [END_TOKEN if ends else answer.first_token],
            "ctx_request_id": number,
            "encoded_opaque_state": str(self.args.tp * self.args.pp),
            "draft_tokens": None,
        }
        if self.dialect != "v5.1":
            params["disagg_request_id"] = asked.disaggregated_params.disagg_request_id
        if self.knobs.fault == "no_request_id":
            params["ctx_request_id" if self.dialect == "v5.1" else "disagg_request_id"] = None
        return web.json_response({**answer.whole(sequence, params), "prompt_token_ids": tokens})

    async def _generation(
        self, request, asked: Body, tokens: list[int], checksum: int, params: DisaggregatedParams, most: int
    ) -> web.StreamResponse:
        # As many tokens as asked for, or drawn where that is left open.
        drawn = int(output_tokens_at(checksum / 2**32)) if checksum % SHORT_EVERY else 2
        sequence = Sequence(len(tokens), min(most, max(asked.min_tokens or 0, drawn)))
        kv_need, there = self.engine.kv_asked(sequence), self.engine.kv_capacity
        need(kv_need <= there, f"the request needs {kv_need} KV-cache tokens; there are {there}", 500)
        gpus = self.args.tp * self.args.pp
        moved_ms = rules.transfer_ms(len(tokens), int(params.encoded_opaque_state or gpus), gpus)
        sequence.transfer_s = self.knobs.time_scale * moved_ms / 1000
        finish = "length" if sequence.output_tokens == most else "stop"
        answer = Answer(next(self.numbers), asked, is_chat(request), self.dialect, checksum, finish)
        answer.first_token = params.first_gen_tokens[0]
        if asked.stream:
            return await self._stream(request, sequence, answer)
        await self.engine.serve(sequence)
        return web.json_response(answer.whole(sequence))

    async def _stream(self, request, sequence: Sequence, answer: Answer) -> web.StreamResponse:
        response = await begin_stream(request)
        sequence.transport, sequence.frame = request.transport, answer.frame
        if sequence.transport is None:  # the client has gone
            return response
        if self.knobs.fault == "no_tokens":
            await asyncio.Event().wait()
        if self.knobs.fault == "truncated_stream" and self.served % self.knobs.fault_count == 0:
            sequence.frame = answer.half_frame
        await self.engine.serve(sequence)
        if not sequence.transport.is_closing():
            await response.write_eof()
        return response

    async def health(self, request) -> web.Response:
        """GET /health."""
        return web.Response(status=503 if self.knobs.fault == "health_503" else 200)
