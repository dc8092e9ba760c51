"""Connections kept open, requests in turn, and what became of each."""

import array
import collections
import itertools
import math
import resource
import time

from .client_settings import ClientError
from .connections import Request
from .http_answer import BAD_ANSWER, DETAIL_ROOM, NO_IDS, STATUSES, AnswerError, failure_of
from .pool import Pool
from .token_ids import ids_of_text, load_tokenizer

LAG_PERIOD_S = 0.02

FILES_BESIDE = 100  # open files that are no connections

IDS_MODES = ("accuracy", "test06")  # LoadGen logs the answers' ids


def allow_open_files(most_open, fix=""):
    """Let this process open as many connections as the machine allows; ClientError if they are fewer than most_open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed = FILES_BESIDE + most_open
    if most != resource.RLIM_INFINITY and most < needed:
        raise ClientError(
            f"{most} files may be open (ulimit -Hn), needed are {needed}. Raise `ulimit -Hn`{fix}"
        )


class Client:
    """Requests between LoadGen and the endpoint's URLs, in turn; everything here runs in the event loop's thread."""

    def __init__(self, loop, loadgen, targets, settings, samples, mode, log):
        self.loop, self.loadgen, self.samples, self.log = loop, loadgen, samples, log
        self.mode, self.settings = mode, settings
        self.want_ids = mode in IDS_MODES
        self.tells_early = not self.want_ids  # the first token's id is not asked for
        self.tokenizer = settings["tokenizer"] if self.want_ids else None
        self.token_latencies = settings["scenario"] == "Server"
        self.pools = [Pool(self, target) for target in targets]
        self.turns, self.queued = itertools.cycle(self.pools), collections.deque()
        self.active, self.held = {}, []
        self.rows, self.lags = array.array("d"), array.array("f")  # seven numbers a query; s
        self.kinds, self.first_failure = collections.Counter(), ""
        self.issued = self.done = self.tokens = self.reported_tokens = self.resent = 0
        self.flushed = False
        self.total = None

    async def open_connections(self, count):
        """Open that many connections before the run, shared out over the URLs; ClientError if one refuses."""
        for pool in self.pools:
            await pool.open_connections(math.ceil(count / len(self.pools)))

    @property
    def connections(self):
        return [connection for pool in self.pools for connection in pool.connections]

    def issue(self, samples):
        """LoadGen's callback, in its thread: must return at once and must not raise."""
        now_s = time.perf_counter()
        self.loop.call_soon_threadsafe(self.begin, [(sample.id, sample.index) for sample in samples], now_s)

    def flush(self):
        """LoadGen's callback, in its thread: all queries have been issued."""
        self.loop.call_soon_threadsafe(self.set_flushed)

    def set_flushed(self):
        self.flushed, self.total = True, self.issued
        self._release_held()

    def begin(self, samples, issue_s):
        """Start requests, or queue them while max_in_flight are open (Offline)."""
        self.issued += len(samples)
        for query_id, index in samples:
            self.queued.append(Request(query_id, index, issue_s, next(self.turns)))
        self.start_queued()

    def start_queued(self):
        """Send what may be sent now."""
        limit = self.settings["max_in_flight"]
        while self.queued and (not limit or len(self.active) < limit):
            request = self.queued.popleft()
            request.start_s = request.issue_s if self.token_latencies else time.perf_counter()
            self.active[request.query_id] = request
            request.pool.issued += 1
            request.pool.send(request)
        if not self.flushed:
            for pool in self.pools:
                pool.keep_spare()

    def resend(self, request):
        """Send a request again over another connection."""
        request.resent, request.connection = True, None
        self.resent += 1
        request.pool.waiting.append(request)
        request.pool.open_one_more()

    def first_content(self, request, ids):
        """The first content came: LoadGen takes its TTFT here."""
        if request.first_s:
            return
        request.first_s = time.perf_counter()
        # TEST06 compares the first id with the answer's and judges no times: text waits for its ids.
        if self.mode != "test06" or ids:
            self._tell_first(request, ids)

    def _tell_first(self, request, ids):
        if self.token_latencies and not request.told:
            request.told = True
            self._tell(self.loadgen.FirstTokenComplete, request, ids)

    def _tell(self, call, request, ids, *count):
        """Hand ids, array("i") or None, to one of LoadGen's two calls; the buffer lives until the call returns."""
        address, size = (ids or NO_IDS).buffer_info()
        call([self.loadgen.QuerySampleResponse(request.query_id, address, 4 * size, *count)])

    def ended(self, request, answer, error):
        """A request is over, well or not."""
        self.active.pop(request.query_id, None)
        request.connection = None
        if error is None:
            try:
                read = answer.result(self.want_ids)
                self._check(request, read)
            except BAD_ANSWER as failure:
                error = failure_of(failure)
        if error is not None:
            self._fail(request, error)
        elif self.want_ids and read.ids is None:
            self.held.append((request, read))  # ids through the tokenizer, after the run
        else:
            self._serve(request, read.ids, read.count)
        self._release_held()

    def _check(self, request, read):
        """Refuse an answer whose usage contradicts what was sent and seen."""
        sent = self.samples.input_tokens[request.index]
        if not request.first_s:
            raise AnswerError("empty", "usage says %d tokens, no content came" % read.count)
        if read.prompt_tokens not in (None, sent):
            said = "usage says that %d prompt tokens were read; %d were sent" % (read.prompt_tokens, sent)
            raise AnswerError("prompt_mismatch", said)

    def _serve(self, request, ids, count):
        self._tell_first(request, ids and ids[:1])
        self._tell(self.loadgen.QuerySamplesComplete, request, ids, count)
        self.done += 1
        self.tokens += count
        request.pool.done += 1
        request.pool.failures_in_a_row = 0
        self._record(request, count, "ok")

    def _fail(self, request, error):
        # Without FirstTokenComplete LoadGen's TTFT and TPOT of the whole run would be garbage, so it gets one;
        # the 0 tokens then leave exactly one error in LoadGen's log for each failed request.
        self._tell_first(request, None)
        self._tell(self.loadgen.QuerySamplesComplete, request, None, 1 if error.kind == "short" else 0)
        pool = request.pool
        self.kinds[error.kind] += 1
        pool.kinds[error.kind] += 1
        pool.failures_in_a_row += 1
        if self.kinds[error.kind] <= 10:
            # Some servers echo the key: masked whole, before the text is cut.
            detail = pool.target.mask(error.detail)[:DETAIL_ROOM]
            where = f" at {pool.target.url}" if len(self.pools) > 1 else ""
            said = f"sample {request.index}{where}: {error.kind}: {detail}"
            self.log("request failed: " + said)
            self.first_failure = self.first_failure or said
        self._record(request, 0, error.kind)

    def _record(self, request, count, status):
        times_s = request.issue_s, request.sent_s, request.first_s, time.perf_counter()
        self.rows.extend((request.index, *times_s, count, STATUSES.index(status)))

    def _release_held(self):
        """After the last answer: ids of text-only answers through the tokenizer, then complete them."""
        if not (self.held and self.flushed and not self.active and not self.queued):
            return
        held, self.held = self.held, []
        encode, end_id, why = load_tokenizer(self.tokenizer)
        for request, read in held:
            ids = encode and ids_of_text(read, encode, end_id)
            if ids:
                # usage's count: the text's ids may be others than the model's
                self._serve(request, ids, read.count)
            else:
                said = f"the server sends text, and {why or 'it has no id'}"
                self._fail(request, AnswerError("no_ids", said))

    def sweep(self):
        """Once a second: end requests that took too long; return the counts for progress.jsonl."""
        now_s = time.perf_counter()
        streamed = 0
        for request in list(self.active.values()):
            connection = request.connection
            answer = connection and connection.answer
            seen = len(answer.payload) + len(answer.reads) if answer else 0
            streamed += seen
            if seen != request.seen:
                # Comments show that the server lives, not that it generates. Mostly the newest read tells.
                newest = (answer.reads or answer.payload)[-max(1, seen - request.seen) :] if answer else ()
                if any(b"data:" in read for read in reversed(newest)):
                    request.seen_s = now_s
                request.seen = seen
            if answer and answer.settled:
                connection.delay_acks(True)
            quiet_s = now_s - max(request.seen_s, request.first_s) if request.first_s else 0.0
            if now_s - request.start_s > self.settings["request_timeout_s"]:
                self._give_up(request, "timeout", now_s - request.start_s)
            elif quiet_s > self.settings["stall_timeout_s"]:
                self._give_up(request, "stalled", quiet_s)
        # Reads stand for tokens until an answer is over; the sum must not fall when the true count replaces them.
        self.reported_tokens = max(self.reported_tokens, self.tokens + streamed)
        failed = sum(self.kinds.values())
        counts = {"time_s": round(time.time(), 3), "issued": self.issued, "done": self.done, "failed": failed}
        counts["outstanding"] = self.issued - self.done - failed
        counts["resent"] = self.resent
        return dict(counts, tokens=self.reported_tokens, total=self.total, kinds=dict(self.kinds))

    def _give_up(self, request, kind, seconds):
        error = AnswerError(kind, "after %.1f s" % seconds)
        if request.connection is not None:
            request.connection._end(error)
        else:
            request.pool.waiting.remove(request)
            self.ended(request, None, error)
            self.start_queued()

    def measure_lag(self, due_s):
        """Record how late the event loop runs a timer."""
        now_s = time.perf_counter()
        self.lags.append(now_s - due_s)
        self.loop.call_later(LAG_PERIOD_S, self.measure_lag, now_s + LAG_PERIOD_S)
