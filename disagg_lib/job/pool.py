"""Connections to one URL, the requests that wait for one, and the URL's share of the counts."""

import asyncio
import collections
import ssl
import time

from .client_settings import ClientError
from .connections import Connection
from .http_answer import AnswerError

CONNECT_S = 30  # for each connection that is opened before the run


class Pool:
    """The part of a Client that has to do with one URL; everything here runs in the event loop's thread."""

    def __init__(self, client, target):
        self.client, self.target = client, target
        self.connections, self.idle = set(), collections.deque()
        self.waiting, self.tasks = collections.deque(), set()
        self.issued = self.done = self.opening = self.failures_in_a_row = 0
        self.kinds = collections.Counter()

    def counts(self):
        """This URL's share of the result."""
        counts = {"url": self.target.url, "issued": self.issued, "done": self.done}
        return dict(counts, failed=sum(self.kinds.values()), kinds=dict(self.kinds))

    async def open_connections(self, count):
        """Open count idle connections before the run; ClientError if the endpoint refuses."""
        for _ in range(count):
            try:
                connection = await asyncio.wait_for(self._connect(), CONNECT_S)
            except (OSError, asyncio.TimeoutError) as error:
                where, why = f"{self.target.host}:{self.target.port}", str(error) or f"none in {CONNECT_S} s"
                fix = "SSL_CERT_FILE names a file of certificates to trust"
                fix = fix if isinstance(error, ssl.SSLError) else "Is the server up?"
                raise ClientError(f"{where} does not accept connections: {why}. {fix}") from None
            self.target.address = connection.transport.get_extra_info("peername")[0]  # one name look-up a run
            self.put_idle(connection)

    async def _connect(self):
        target = self.target
        name = target.host if target.ssl else None
        _, connection = await self.client.loop.create_connection(
            lambda: Connection(self), target.address, target.port, ssl=target.ssl, server_hostname=name
        )
        self.connections.add(connection)
        return connection

    def open_one_more(self):
        self.opening += 1
        task = self.client.loop.create_task(self._open())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def keep_spare(self):
        """Open connections ahead of need, so that a request seldom pays for its handshake."""
        if len(self.idle) + self.opening < self.client.settings["connections"] // 4:
            self.open_one_more()

    async def _open(self):
        try:
            connection = await self._connect()
        except OSError as error:
            connection, refused = None, AnswerError("refused", str(error))
        self.opening -= 1
        if connection is not None:
            self.put_idle(connection)
        elif len(self.waiting) > self.opening:
            self.client.ended(self.waiting.popleft(), None, refused)
            self.client.start_queued()

    def send(self, request):
        """Send a request over a free connection, or let it wait for one more."""
        connection = self._take_idle(time.perf_counter())
        if connection is not None:
            connection.send(request, self.client.samples.parts[request.index])
        else:
            self.waiting.append(request)
            self.open_one_more()

    def put_idle(self, connection):
        """A connection is free: the oldest request that waits for one takes it."""
        if self.waiting:
            request = self.waiting.popleft()
            connection.send(request, self.client.samples.parts[request.index])
        else:
            connection.idle_since_s = time.perf_counter()
            self.idle.append(connection)

    def forget(self, connection):
        """A connection is closed."""
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def _take_idle(self, now_s):
        """Return a free connection or None. One that idled long may be closing at the server's side right now."""
        while self.idle:
            # Unused ones first, the oldest: a server may keep a thread for each, and look at no more than it has threads.
            connection = self.idle.pop() if self.idle[-1].used else self.idle.popleft()
            fresh = (
                not connection.used or now_s - connection.idle_since_s < self.client.settings["keep_alive_s"]
            )
            if fresh and not connection.is_closing():
                return connection
            connection.abort()
        return None
