"""A relay in front of a server: passes everything through and keeps what was said."""

import asyncio
import functools
import json
import threading

import aiohttp
from aiohttp import web


class Relay:
    """Relays of several ports, in a thread of their own; `heard` holds (port behind, path, body, status, answer)."""

    def __init__(self, *ports):
        self.behind, self.heard, self.ports = ports, [], []

    def __enter__(self):
        started = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(started),))
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        self.loop.close()

    async def _serve(self, started):
        self.stop, runners = asyncio.Event(), []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self.session:
            for port in self.behind:
                app = web.Application(client_max_size=2**26)
                app.router.add_route("*", "/{path:.*}", functools.partial(self._pass, port))
                runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
                await runner.setup()
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.ports.append(runner.addresses[0][1])
                runners.append(runner)
            started.set()
            await self.stop.wait()
            for runner in runners:
                await runner.cleanup()

    async def _pass(self, port, request):
        data = await request.read()
        url = f"http://127.0.0.1:{port}{request.path}"
        async with self.session.request(request.method, url, data=data) as answer:
            if "event-stream" not in answer.headers.get("Content-Type", ""):
                content = await answer.read()
                response = web.Response(body=content, status=answer.status, content_type=answer.content_type)
            else:
                response = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": "text/event-stream"}
                )
                response.enable_chunked_encoding()
                await response.prepare(request)
                content = b""
                async for part in answer.content.iter_any():
                    content += part
                    await response.write(part)
                await response.write_eof()
        if request.method == "POST":
            self.heard.append((port, request.path, json.loads(data), answer.status, content))
        return response
