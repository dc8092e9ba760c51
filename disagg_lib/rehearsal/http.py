"""The HTTP side, on aiohttp: messages as of TensorRT-LLM's OpenAI-compatible servers; `--help` lists the differences."""

import asyncio
import os
import signal
import socket
import sys

import aiohttp
from aiohttp import web
from uvloop import new_event_loop

from ..errors import DisaggError
from .answers import ENDPOINTS
from .configuration import ServeFile
from .knobs import Knobs, log
from .orchestrator import Orchestrator
from .worker import Worker


async def _listen(server: Worker | Orchestrator, host: str, port: int) -> None:
    node = os.environ.get("SLURMD_NODENAME")
    if node and socket.gethostbyname(host) != socket.gethostbyname(node):
        # On a virtual test cluster all nodes share one network; a real one could not bind another node's address.
        where = f"this step runs on {node}. Pin it to the node whose name it binds."
        raise DisaggError(f"{host}: cannot listen: {where}")

    async def version(request) -> web.Response:
        return web.json_response({"version": f"rehearsal of {server.dialect}"})

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post(path, server.complete) for path in ENDPOINTS])
    app.add_routes([web.get("/health", server.health), web.get("/version", version)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        # A machine that is overloaded for seconds lets connections wait instead of resetting them (aiohttp's own: 128).
        await web.TCPSite(runner, host, port, backlog=4096).start()
    except OSError as error:
        ask = "Is another server on it, or is it another node's name?"
        raise DisaggError(f"{host}:{port}: cannot listen ({error}). {ask}") from None


def _run(serving) -> None:
    """Run the coroutine until SIGTERM or SIGINT, which end the process at once."""

    def end() -> None:
        sys.stdout.flush()
        os._exit(0)  # open streams are cut, as a server that is told to end cuts them

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for number in (signal.SIGTERM, signal.SIGINT):
            runner.get_loop().add_signal_handler(number, end)
        runner.run(serving)


def run_server(worker: Worker, host: str, port: int) -> None:
    """Load, listen on host:port, serve until signalled."""

    async def serve() -> None:
        await worker.load()
        await _listen(worker, host, port)
        log(worker.name, f"ready on http://{host}:{port}")
        await worker.engine.run()

    _run(serve())


def run_orchestrator(file: ServeFile, start_timeout_s: float, request_timeout_s: float, knobs: Knobs) -> None:
    """Wait for the workers, listen on hostname:port, serve until signalled."""

    async def serve() -> None:
        orchestrator = Orchestrator(file, request_timeout_s, knobs)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as orchestrator.session:
            log("orchestrator", f"waiting for {len(file.instances)} servers")
            await orchestrator.wait_for_workers(start_timeout_s)
            await _listen(orchestrator, file.hostname, file.port)
            log("orchestrator", f"ready on http://{file.hostname}:{file.port}")
            await asyncio.Event().wait()

    _run(serve())
