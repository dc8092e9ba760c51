"""A small streaming server on loopback, which answers or fails as it is told."""

import asyncio
import json
import threading


def event(message) -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """A small streaming server on a free loopback port, in a thread of its own.

    plan(n) names what the n-th completion request gets: "ok" or a fault. It differs from trtllm-serve in that
    its text is made up; its ids are 1000, 1001, ...
    """

    HEAD = b"HTTP/1.1 200 OK\r\ncOnTeNt-TyPe: text/event-stream\r\nTRANSFER-encoding: Chunked\r\n\r\n"

    def __init__(self, plan=lambda n: "ok", step_s=0.002, with_ids=True, tls=None):
        self.plan, self.step_s, self.with_ids, self.tls = plan, step_s, with_ids, tls
        self.heads, self.bodies, self.writers, self.asked = [], [], [], 0
        self.loop = asyncio.new_event_loop()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        assert self.started.wait(5)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(5)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    @property
    def connections(self):
        return len(self.writers)

    async def _serve(self):
        self.stop = asyncio.Event()
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self.tls)
        scheme, port = "https" if self.tls else "http", self.server.sockets[0].getsockname()[1]
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.started.set()
        await self.stop.wait()
        self.server.close()
        await asyncio.sleep(
            0.05
        )  # a connection that was just accepted is a task of asyncio's own until it has a transport
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close in the loop's next turns

    async def _connection(self, reader, writer):
        self.writers.append(writer)
        try:
            while await self._request(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        what = self.plan(self.asked)
        self.asked += 1
        return await self._answer(writer, head, body, what)

    async def _answer(self, writer, head, body, what):
        if what in ("429", "500", "400", "401"):
            text = b'{"error": "told to"} %s%s' % (250 * b"x", head.partition(b"Authorization: ")[2])
            writer.write(
                b"HTTP/1.1 %s Told\r\nContent-Length: %d\r\n\r\n%s" % (what.encode(), len(text), text)
            )
            return True
        if what == "silent":
            await asyncio.sleep(60)
        if what == "vanish":
            return False
        if what == "vanish_late":  # it has worked for the request
            await asyncio.sleep(1.5)
            return False
        if what == "not_http":
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            return False
        if what == "stop_listening":
            self.server.close()
        count = {"short": 1, "empty": 0, "claims_tokens": 0}.get(what, body["max_tokens"])
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + self.HEAD + chunk(b": hello\n\n"))
        for n in range(count):
            if what in ("cut", "cut_politely", "stalled", "pings", "error_event") and n == 3:
                break
            text = {("split", 0): " t", ("split", 1): "1", ("surrogate", 0): "\ud83d"}.get(
                (what, n), f" t{n}"
            )
            choice = {"index": 0, "text": text}
            if self.with_ids:
                choice["token_ids"] = [1000 + n]
            writer.write(chunk(event({"choices": [choice]})))
            await asyncio.sleep(self.step_s)
        while what in ("stalled", "pings"):
            await asyncio.sleep(0.3)
            if what == "pings":
                writer.write(chunk(b": ping\n\n"))
        if what == "cut":
            return False
        if what == "error_event":
            writer.write(chunk(event({"error": {"message": "told to"}})))
        elif what != "cut_politely":
            said = {"mismatch": count + 1, "claims_tokens": 5}.get(what, count)
            if what != "no_usage":
                writer.write(chunk(event({"choices": [], "usage": {"completion_tokens": said}})))
            writer.write(chunk(event(b"[DONE]")))
        writer.write(b"0\r\n\r\n")
        return True
