"""One connection to the endpoint, and the request that it carries."""

import asyncio
import select
import socket
import time

from .http_answer import BAD_ANSWER, HAS_CONTENT, LOOK_BACK, NO_EVENT, OK, Answer, AnswerError, failure_of

RESEND_S = 1.0  # an end so soon after a request was written, and without a word, is no answer to it


class Request:
    """One LoadGen sample on its way. Times are time.perf_counter() in s."""

    def __init__(self, query_id, index, issue_s, pool):
        self.query_id, self.index, self.issue_s, self.pool = query_id, index, issue_s, pool
        self.start_s = self.sent_s = self.first_s = self.seen_s = 0.0
        self.seen = 0
        self.told = False  # LoadGen has had FirstTokenComplete
        self.resent = False
        self.connection = None


class Connection(asyncio.Protocol):
    """One keep-alive connection; it carries one request at a time."""

    def __init__(self, pool):
        self.pool, self.client, self.head = pool, pool.client, pool.target.head
        self.transport = self.request = self.answer = None
        self.keep = None  # the settled answer's `reads.append`
        self.delays_acks = False
        self.idle_since_s = time.perf_counter()
        self.used = self.reused = False

    def connection_made(self, transport):
        self.transport = transport

    def send(self, request, parts):
        """Write a prepared request."""
        self.reused, self.used = self.used, True
        self.request, self.answer = request, Answer()
        request.connection = self
        self.transport.writelines((self.head, *parts))
        request.sent_s = request.sent_s or time.perf_counter()
        self.delay_acks(False)

    def abort(self):
        """End it for reasons of our own, so that nothing is sent again."""
        self.reused = False
        self.transport.abort()

    def is_closing(self):
        """Whether the server has ended it, be it that the event loop has not come to that yet.

        Nothing is due on an idle connection, so whatever there is to read tells of an end.
        """
        if self.transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    def delay_acks(self, wanted):
        """Let the kernel acknowledge two reads together, the first at most 40 ms late, or go its own way. Linux only.

        It tends to acknowledge each small read, which is a quarter of the client's CPU. A server that left Nagle's
        algorithm on waits for that before its next event, so short answers, where it would count, are left alone.
        """
        if wanted != self.delays_acks and hasattr(socket, "TCP_QUICKACK"):
            self.delays_acks = wanted
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0 if wanted else 1)

    def data_received(self, data):
        keep = self.keep
        if keep is not None and len(data) > 3 and data[-4:] != b"\r\n\r\n":
            keep(data)
        elif self.answer is not None:
            self._feed(self.answer, data)

    def _feed(self, answer, data):
        waiting = answer.first is None
        has_content = waiting and self.client.tells_early and HAS_CONTENT(data, max(0, len(data) - LOOK_BACK))
        if has_content and (answer.status == 200 or data.startswith(OK)):
            self.client.first_content(self.request, None)  # before the answer is looked into
        try:
            answer.feed(data)
        except BAD_ANSWER as error:
            self._end(failure_of(error))
            return
        if waiting and answer.first is not None:
            self.client.first_content(self.request, answer.first[1])
        if answer.ended:
            self._end(None)
        elif answer.settled:
            self.keep = answer.reads.append  # `feed` may have begun a new list

    def _end(self, error):
        """The answer is over: hand it on; keep the connection only after a whole answer."""
        request, answer = self.request, self.answer
        self.request = self.answer = self.keep = None
        reusable = error is None and answer.ended and not answer.close
        self.client.ended(request, answer, error)
        if reusable:
            self.pool.put_idle(self)
        else:
            self.abort()
        self.client.start_queued()

    def connection_lost(self, exc):
        self.pool.forget(self)
        if self.request is None:
            return
        soon = time.perf_counter() - self.request.sent_s < RESEND_S
        if self.reused and soon and not self.request.resent and self.answer.is_empty():
            # The server ended an idle connection as we wrote. The answer is the same whichever request gets it
            # (RFC 9110, 9.2.2), and its times count from LoadGen's issue: once more.
            self.client.resend(self.request)
            return
        whole = exc is None and self.answer.framing == "eof" or self.answer.status not in (0, 200)
        silent = self.answer.status == 200 and not self.answer.payload
        said = NO_EVENT if silent else "connection closed: %s" % (exc or "end of stream")
        self._end(None if whole else AnswerError("cut", said))
