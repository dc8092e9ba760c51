"""The serving model in real time: a context and a generation server's step loops, on the clock of an asyncio loop.

Steps are planned on nominal times (the end of the step before, never the moment of waking up), so a late wake-up delays one
step's output and not those after it. `simulate` runs the same rules in virtual time.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from ..serving import rules
from ..serving.latency import LatencyTable
from .configuration import EngineArgs


@dataclass(eq=False)
class Sequence:
    """One request inside an engine; `transport` takes the frames that `frame` makes, None collects only."""

    input_tokens: int
    output_tokens: int
    done: asyncio.Event = field(default_factory=asyncio.Event)
    transfer_s: float = 0.0
    computed: int = 0
    busy_until: float = 0.0
    emitted: int = 0
    ready: float = 0.0
    transport: asyncio.Transport | None = None
    frame: object = None


class Engine:
    """What both servers share: the table, the stages, the waiting line and the record of steps."""

    def __init__(self, args: EngineArgs, table: LatencyTable, seconds_per_ms: float, log=None):
        self.args, self.table, self.scale = args, table, seconds_per_ms
        self.kv_capacity = table.kv_capacity_tokens(args.kv_fraction, args.max_num_tokens)
        self.stage_free = [0.0] * args.pp
        self.waiting: deque[Sequence] = deque()
        self.wake = asyncio.Event()
        self.steps = 0
        self.log = log

    async def serve(self, sequence: Sequence) -> None:
        """Put a request at the end of the line, and wait until it has ended."""
        self.waiting.append(sequence)
        self.wake.set()
        await sequence.done.wait()

    def _record(self, step_ms: float, requests: int, context_tokens: int, generation_tokens: int) -> None:
        self.steps += 1
        if self.args.print_iter_log and self.log:
            self.log(
                f"iter = {self.steps}, global_rank = 0, rank = 0, elapsed_time = {step_ms * self.scale:.4f}s,"
                f" num_scheduled_requests: {requests}, states = {{'num_ctx_requests': {requests if context_tokens else 0},"
                f" 'num_ctx_tokens': {context_tokens}, 'num_generation_tokens': {generation_tokens}}}"
            )

    async def _until(self, when: float) -> None:
        await asyncio.sleep(max(0.0, when - asyncio.get_running_loop().time()))

    async def _work(self) -> float:
        """Wait for a request and return now: the nominal clock starts again after idling."""
        self.wake.clear()
        await self.wake.wait()
        return asyncio.get_running_loop().time()


class ContextEngine(Engine):
    """First-come-first-served chunks of max_num_tokens, several requests in a step, overlap off."""

    async def run(self) -> None:
        """Serve for ever; sets a sequence's `done` at the end of the step that holds its last prompt token."""
        loop = asyncio.get_running_loop()
        table, args = self.table.context, self.args
        now = 0.0
        while True:
            while not self.waiting:
                now = await self._work()
            start = max(now, self.stage_free[0])
            line = list(self.waiting)
            left, busy = [s.input_tokens - s.computed for s in line], [s.busy_until for s in line]
            begin = rules.context_start(left, busy, 0, len(line), start)
            if begin > start:  # until then, or until another prompt comes
                self.wake.clear()
                loop.call_at(begin, self.wake.set)
                await self.wake.wait()
                now = min(begin, loop.time())
                continue
            chunks = [0] * len(line)
            most = args.max_num_tokens, args.max_batch_size
            count = rules.context_chunks(left, busy, 0, len(line), start, *most, chunks)
            step_ms = rules.context_step_ms(table, chunks, [s.computed for s in line], count)
            end = rules.stage_pass(start, step_ms * self.scale, self.stage_free)
            self._record(step_ms, sum(c > 0 for c in chunks[:count]), sum(chunks[:count]), 0)
            for sequence, chunk in zip(line, chunks[:count], strict=False):
                sequence.computed += chunk
                if chunk and not args.chunks_overlap:
                    sequence.busy_until = end
            finished = [s for s in line if s.computed == s.input_tokens]
            self.waiting = deque(s for s in self.waiting if s not in finished)
            loop.call_at(end, lambda finished=finished: [s.done.set() for s in finished])  # in their order
            await self._until(self.stage_free[0])


class GenerationEngine(Engine):
    """In-flight batching: at each step boundary requests are admitted, join, and every sequence gets one token.

    A request is admitted when a slot and KV room are free; then its KV cache is moved; at the first boundary after that it
    joins and its first token goes out. With PP, as many batches as stages take turns.
    """

    def __init__(self, args: EngineArgs, table: LatencyTable, seconds_per_ms: float, log=None):
        super().__init__(args, table, seconds_per_ms, log)
        self.grows = args.capacity_policy == "MAX_UTILIZATION"
        self.slowdown = 1.0
        self.admitted = 0
        self.moving: list[Sequence] = []
        self.groups: list[list[Sequence]] = [[] for _ in range(args.pp)]

    def _reserved(self, s: Sequence) -> int:
        return rules.kv_tokens(s.input_tokens, s.output_tokens)

    def kv_asked(self, s: Sequence) -> int:
        """KV-cache tokens that must be free for a request to be admitted."""
        return rules.kv_asked(s.input_tokens, self._reserved(s), self.grows)

    def kv_used(self) -> int:
        """KV-cache tokens of those that generate or are on their way."""
        inside = (s for group in [self.moving, *self.groups] for s in group)
        return sum(rules.kv_held(s.input_tokens, s.emitted, self._reserved(s), self.grows) for s in inside)

    def _admit(self, start: float, group: list[Sequence], turn: int) -> None:
        self.groups[turn] = group
        used = self.kv_used() if self.waiting else 0
        while self.waiting and self.admitted < self.args.max_batch_size * self.args.pp:
            sequence = self.waiting[0]
            if used + self.kv_asked(sequence) > self.kv_capacity:
                return
            self.waiting.popleft()
            self.admitted += 1
            sequence.ready = start + sequence.transfer_s
            self.moving.append(sequence)
            used += rules.kv_held(sequence.input_tokens, 0, self._reserved(sequence), self.grows)

    def _emit(self, sequence: Sequence) -> bool:
        """Send the next token; False when the sequence has ended (or its client has gone)."""
        sequence.emitted += 1
        gone = sequence.transport is not None and sequence.transport.is_closing()
        if sequence.transport is not None and not gone:
            # Straight to the transport: never blocks the step on one slow reader, and at most an answer is buffered.
            sequence.transport.write(sequence.frame(sequence))
        if sequence.emitted < sequence.output_tokens and not gone:
            return True
        self.admitted -= 1
        sequence.done.set()
        return False

    async def run(self) -> None:
        """Serve for ever."""
        table, args = self.table.generation, self.args
        ends = [0.0] * args.pp
        now = 0.0
        turn = 0
        while True:
            if not any(self.groups):
                if self.moving:
                    now = max(now, min(s.ready for s in self.moving))
                elif not self.waiting:
                    now = await self._work()
            start = max(now, self.stage_free[0], ends[turn])
            await self._until(start)
            group = [s for s in self.groups[turn] if self._emit(s)]
            self._admit(start, group, turn)
            joining = [s for s in self.moving if s.ready <= start][: args.max_batch_size - len(group)]
            self.moving = [s for s in self.moving if s not in joining]
            group += [s for s in joining if self._emit(s)]
            self.groups[turn] = group
            if group:
                mean_tokens = sum(s.input_tokens + s.emitted for s in group) / len(group)
                graphs = args.graph_sizes, args.graph_padding, rules.EAGER_FLOOR_MS
                step_ms = self.slowdown * rules.generation_step_ms(table, len(group), mean_tokens, *graphs)
                ends[turn] = rules.stage_pass(start, step_ms * self.scale, self.stage_free)
                self._record(step_ms, len(group), 0, len(group))
            turn = (turn + 1) % args.pp
