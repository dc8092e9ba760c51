"""How much CPU a streamed token costs in the measuring client, and what it adds to TTFT, beside other clients.

    python benchmarks/client.py                        interleaved, three rounds, at 50,000 events/s; about 10 minutes
    python benchmarks/client.py --sink                 what the sink itself reaches
    python benchmarks/client.py --memory-minutes 10    our client alone: memory over time

Needs a C compiler, two cores and the extra `bench`. The sink (sse_sink.c) has one core, each client the other. The
sink notes when it wrote the first event of each answer, on the clock that the clients read: TTFT added is the time
from there to the client's "first token" call. The floor's is what waking a process costs on this machine. CPU is that of the client's process and its children. Requests carry
9,400 token ids. Clients that cannot follow are given a tenth of the rate, which only helps them.
"""

import argparse
import array
import asyncio
import collections
import concurrent.futures
import contextlib
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from disagg_lib.job import client, client_settings, prompts, sender, target

HERE = Path(__file__).parent
SINK_CORE, CLIENT_CORE = 1, 0
SLOW = {"httpx", "requests"}


def build_sink(folder: Path) -> Path:
    """Compile the sink with the machine's C compiler."""
    sink = folder / "sse_sink"
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", sink, HERE / "sse_sink.c"], check=True)
    return sink


@contextlib.contextmanager
def running_sink(sink: Path, ttft_ms: float, tpot_ms: float, core: int | None = SINK_CORE):
    """Run the sink on its own core; yield its port."""
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    process = subprocess.Popen(
        [sink, str(round(ttft_ms * 1000)), str(round(tpot_ms * 1000))], stdout=subprocess.PIPE, preexec_fn=pin
    )
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def sink_log(port: int) -> np.ndarray:
    """Return the sink's rows: number, received, first, last (ns), events, writes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return np.array([line.split() for line in answer.read().splitlines()], dtype=np.int64).reshape(-1, 6)


def steady_events_per_s(rows):
    """Return the rate while streams neither only begin nor only end: from the first end of one to the last beginning."""
    first, last, events = rows[:, 2], rows[:, 3], rows[:, 4]
    begin, end = sorted((last.min(), first.max()))
    share = (np.minimum(last, end) - np.maximum(first, begin)).clip(0) / (last - first)
    return float((share * events).sum() / (end - begin) * 1e9)


class Load:
    """The same for every client: when each request starts, its bytes, and what the client saw."""

    def __init__(self, port, per_s, seconds, tokens):
        self.port, self.tokens = port, tokens
        self.url = f"http://127.0.0.1:{port}/v1/completions"
        # Poisson, as LoadGen draws them: evenly spaced requests would make all streams send at the same moments.
        self.at_s = np.cumsum(
            np.random.RandomState(405).exponential(1 / per_s, round(per_s * seconds))
        ).tolist()
        self.ids = b",".join(b"%d" % (10000 + n) for n in range(9399))
        # Whole from the beginning, so that what grows is the client's.
        self.first_ns, self.done_ns = (array.array("q", bytes(8 * len(self.at_s))) for _ in range(2))
        self.counted, self.same_ids = 0, False

    def body(self, number):
        return b'{"prompt":[%d,%s],"max_tokens":%d,"stream":true}' % (number, self.ids, self.tokens)

    def bodies(self):
        return [self.body(number) for number in range(len(self.at_s))]

    def first(self, number):
        self.first_ns[number] = time.perf_counter_ns()

    def done(self, number, ids):
        self.done_ns[number] = time.perf_counter_ns()
        self.counted += len(ids) if hasattr(ids, "__len__") else ids


async def start_on_time(load, start):
    """Call start(number) at each request's time; return when all have been started."""
    begin = time.perf_counter()
    for number, at_s in enumerate(load.at_s):
        wait = begin + at_s - time.perf_counter()
        await asyncio.sleep(max(wait, 0))
        start(number)


class FakeLoadGen:
    """Stands where the module mlperf_loadgen would: notes the calls. Its own cost was measured below 1 us."""

    def __init__(self, load, finished):
        self.load, self.finished, self.left = load, finished, len(load.at_s)

    def QuerySampleResponse(self, number, address, size, n_tokens=0):
        return number, n_tokens

    def FirstTokenComplete(self, responses):
        self.load.first(responses[0][0])

    def QuerySamplesComplete(self, responses):
        self.load.done(*responses[0])
        self.left -= 1
        if not self.left:
            self.finished.set()


def run_ours(load, mode="performance", urls=1):
    """Our client without LoadGen; mode accuracy also reads every id. Of several URLs all are the one sink's."""
    import gc

    async def watch(client):
        while True:
            await asyncio.sleep(1)
            client.sweep()

    async def main():
        loop, finished = asyncio.get_running_loop(), asyncio.Event()
        settings = {"endpoint": "/v1/completions", "model": "m", "connections": 64, "total_sample_count": 0}
        settings = {**client_settings.DEFAULTS, **settings}
        targets = [target.Target(f"http://127.0.0.1:{load.port}", settings["endpoint"])] * urls
        samples = prompts.Samples(settings)
        ids = memoryview(load.ids)
        for number in range(len(load.at_s)):
            if not load.same_ids:
                ids = memoryview(b"%d,%s" % (number, load.ids))
            samples.add(number, ids, 9400, load.tokens, load.tokens)
        client = sender.Client(loop, FakeLoadGen(load, finished), targets, settings, samples, mode, print)
        await client.open_connections(64 // urls)
        gc.freeze()
        gc.disable()
        begin_cpu()
        client.measure_lag(time.perf_counter())
        watching = loop.create_task(watch(client))
        await start_on_time(load, lambda number: client.begin([(number, number)], time.perf_counter()))
        await finished.wait()
        watching.cancel()
        assert not client.kinds, client.kinds

    loop = client.new_event_loop()
    loop.run_until_complete(main())


class Taker(asyncio.Protocol):
    """Takes the bytes, notes the first read and the last, looks at nothing else: what no client here can go below."""

    def __init__(self, load, idle, finished):
        self.load, self.idle, self.finished = load, idle, finished

    def connection_made(self, transport):
        self.transport = transport
        self.idle.append(self)

    def start(self, number):
        body = self.load.body(number)
        self.number, self.waiting = number, True
        self.transport.writelines([b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body), body])
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)  # as ours does while an answer streams

    def data_received(self, data):
        if self.waiting:
            self.waiting = False
            self.load.first(self.number)
        if data.endswith(b"\r\n0\r\n\r\n"):
            self.load.done(self.number, self.load.tokens)
            self.idle.append(self)
            if self.load.counted == self.load.tokens * len(self.load.at_s):
                self.finished.set()


def run_floor(load):
    """A protocol on uvloop that only takes the bytes."""

    async def main():
        loop, idle, finished = asyncio.get_running_loop(), [], asyncio.Event()
        for _ in range(3000):  # more than are ever open
            await loop.create_connection(lambda: Taker(load, idle, finished), "127.0.0.1", load.port)
        begin_cpu()
        await start_on_time(load, lambda number: idle.pop().start(number))
        await finished.wait()

    loop = client.new_event_loop()
    loop.run_until_complete(main())


def parse_line(line, ids, loads):
    """Take one line of an answer; return whether it held content."""
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return False
    choices = loads(line[6:])["choices"]
    if not choices:
        return False
    ids.extend(choices[0]["token_ids"])
    return bool(choices[0]["text"])


async def aiohttp_requests(start_all, on_first, on_done, url, body_of):
    """One event loop of the aiohttp design: a task a request, a line at a time, orjson for each."""
    import aiohttp
    import orjson

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=600),
        read_bufsize=1 << 20,
    ) as session:

        async def one(number):
            ids, waiting = [], True
            async with session.post(url, data=body_of(number)) as answer:
                async for line in answer.content:
                    if parse_line(line, ids, orjson.loads) and waiting:
                        on_first(number)
                        waiting = False
            on_done(number, ids)

        tasks = set()

        def start(number):
            task = asyncio.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        await start_all(start)
        while tasks:
            await asyncio.wait(tasks)


def run_aiohttp(load):
    """aiohttp + uvloop + orjson in one process."""
    bodies = load.bodies()

    async def start_all(start):
        begin_cpu()
        await start_on_time(load, start)

    loop = client.new_event_loop()
    loop.run_until_complete(aiohttp_requests(start_all, load.first, load.done, load.url, bodies.__getitem__))


def run_httpx(load):
    """httpx + orjson on uvloop."""
    import httpx
    import orjson

    bodies = load.bodies()

    async def main():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=600) as session:

            async def one(number):
                ids, waiting = [], True
                async with session.stream("POST", load.url, content=bodies[number]) as answer:
                    async for line in answer.aiter_lines():
                        if parse_line(line.encode(), ids, orjson.loads) and waiting:
                            load.first(number)
                            waiting = False
                load.done(number, ids)

            tasks = []
            begin_cpu()
            await start_on_time(load, lambda number: tasks.append(asyncio.create_task(one(number))))
            await asyncio.gather(*tasks)

    loop = client.new_event_loop()
    loop.run_until_complete(main())


def run_requests(load):
    """requests, one thread for each open request."""
    import requests

    bodies, local = load.bodies(), threading.local()

    def one(number):
        session = local.__dict__.setdefault("session", requests.Session())
        ids, waiting = [], True
        with session.post(load.url, data=bodies[number], stream=True, timeout=600) as answer:
            for line in answer.iter_lines(chunk_size=None):
                if parse_line(line, ids, json.loads) and waiting:
                    load.first(number)
                    waiting = False
        load.done(number, ids)

    begin_cpu()
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(2000) as pool:
        futures = []
        for number, at_s in enumerate(load.at_s):
            time.sleep(max(begin + at_s - time.perf_counter(), 0))
            futures.append(pool.submit(one, number))
        for future in futures:
            future.result()


def worker(url, tasks_at, answers_at, tokens, ids):
    """A worker of the harness design: requests come over ZMQ, first tokens and whole answers go back over ZMQ."""
    import orjson
    import zmq
    import zmq.asyncio

    def body_of(number):
        return b'{"prompt":[%d,%s],"max_tokens":%d,"stream":true}' % (number, ids, tokens)

    async def main():
        context = zmq.asyncio.Context()
        tasks, answers = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        tasks.connect(tasks_at)
        answers.connect(answers_at)
        answers.set_hwm(0)
        await answers.send(orjson.dumps(["ready"]))

        def tell(*message):
            # A PUSH without a high-water mark takes the message at once.
            answers._shadow_sock.send(orjson.dumps(message), zmq.DONTWAIT)

        async def start_all(start):
            while True:
                message = orjson.loads(await tasks.recv())
                if message is None:
                    return
                start(message)

        await aiohttp_requests(
            start_all, lambda n: tell("first", n), lambda n, got: tell("done", n, got), url, body_of
        )
        context.destroy(linger=1000)

    loop = client.new_event_loop()
    loop.run_until_complete(main())


def run_workers(load, count=2):
    """The design of NVIDIA's v5.1 harness: LoadGen's process hands requests to worker processes over ZMQ."""
    import orjson
    import zmq

    context = zmq.Context()
    tasks, answers = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    places = [
        f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in (tasks, answers)
    ]
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=worker, args=(load.url, *places, load.tokens, load.ids), daemon=True)
        for _ in range(count)
    ]
    for process in workers:
        process.start()
    for _ in workers:
        answers.recv()

    def receive():
        left = len(load.at_s)
        while left:
            message = orjson.loads(answers.recv())
            if message[0] == "first":
                load.first(message[1])
            else:
                load.done(message[1], message[2])
                left -= 1

    receiver = threading.Thread(target=receive)
    receiver.start()
    begin_cpu(workers)
    begin = time.perf_counter()
    for number, at_s in enumerate(load.at_s):
        time.sleep(max(begin + at_s - time.perf_counter(), 0))
        tasks.send(orjson.dumps(number))
    receiver.join()
    load.children_cpu_s = children_cpu_s(workers) - CPU["children"]
    for _ in workers:
        tasks.send(orjson.dumps(None))
    for process in workers:
        process.join(5)
    context.destroy(linger=0)


CLIENTS = {
    "floor": run_floor,
    "ours": run_ours,
    "ours, two URLs": lambda load: run_ours(load, urls=2),
    "ours, every id read": lambda load: run_ours(load, "accuracy"),
    "aiohttp": run_aiohttp,
    "workers": run_workers,
    "httpx": run_httpx,
    "requests": run_requests,
}
WORDS = {
    "floor": "the floor: a protocol on uvloop that only takes the bytes",
    "aiohttp": "aiohttp + uvloop + orjson",
    "workers": "NVIDIA harness design: 2 aiohttp + orjson workers behind ZMQ",
    "httpx": "httpx + orjson",
    "requests": "requests, a thread each",
}
CPU = {}


def children_cpu_s(processes):
    """Return the CPU seconds of running processes."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def begin_cpu(children=()):
    """Preparation is over: CPU counts from here."""
    CPU.update(own=time.process_time(), children=children_cpu_s(children))


def run_one(name, port, per_s, seconds, tokens, same_ids=False):
    """Run one client in this process; print its figures as JSON. With same_ids the prompts take no memory."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    load = Load(port, per_s, seconds, tokens)
    load.same_ids = same_ids
    load.children_cpu_s = 0.0
    begin = time.perf_counter()
    CLIENTS[name](load)
    cpu_s = time.process_time() - CPU["own"] + load.children_cpu_s
    rows = sink_log(port)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    assert len(rows) == len(load.at_s) and load.counted == tokens * len(rows), (len(rows), load.counted)
    added_ms = (np.array(load.first_ns) - rows[:, 2]) / 1e6
    behind_ms = (np.array(load.done_ns) - rows[:, 3]) / 1e6
    streaming_s = (rows[:, 3] - rows[:, 2]).sum() / 1e9
    figures = {
        "cpu_us": 1e6 * cpu_s / load.counted,
        "ttft_added_p50_ms": None if same_ids else float(np.percentile(added_ms, 50)),
        "ttft_added_p99_ms": None if same_ids else float(np.percentile(added_ms, 99)),
        "end_added_p99_ms": None if same_ids else float(np.percentile(behind_ms, 99)),
        "events_per_write": float(rows[:, 4].sum() / rows[:, 5].sum()),
        "sent_tpot_ms": 1e3 * streaming_s / (rows[:, 4] - 1).sum(),
        "events_per_s": steady_events_per_s(rows),
        "wall_s": time.perf_counter() - begin,
    }
    print(json.dumps(figures))


def measure(sink, name, options, tries=3):
    """Run one client in a process of its own against a fresh sink; again if another process took the sink's core."""
    share = 0.1 if name in SLOW else 1.0
    per_s = share * options.events_per_s / options.tokens
    with running_sink(sink, options.ttft_ms, options.tpot_ms) as port:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, "--port", str(port), "--per-s", str(per_s)]
            + ["--seconds", str(options.seconds), "--tokens", str(options.tokens)],
            capture_output=True,
            text=True,
            timeout=600,
        )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if figures["events_per_write"] > 1.02 and tries > 1:
        print(
            f"{name}: the sink itself was late ({figures['events_per_write']:.2f} events a write): again",
            file=sys.stderr,
        )
        return measure(sink, name, options, tries - 1)
    return figures


def compare(sink, options):
    """Interleave the clients; print the medians as a table."""
    names = [name for name in CLIENTS if not options.only or name in options.only]
    results = collections.defaultdict(list)
    for turn in range(options.rounds):
        for name in names:
            results[name].append(measure(sink, name, options))
            print(f"round {turn + 1}, {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
    rows = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    print(
        f"\n{options.events_per_s} events/s of 304 bytes offered, {options.tokens} an answer, {options.rounds} rounds, "
        f"medians; load average of the machine {os.getloadavg()[1]:.1f}, of which this is about 1.7"
    )
    print(
        "| client | CPU, us a token | TTFT added, p50 ms | p99 ms | end added, p99 ms | events a write | events/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {WORDS.get(name, name)} | {row['cpu_us']:.2f} | {row['ttft_added_p50_ms']:.3f} "
            f"| {row['ttft_added_p99_ms']:.3f} | {row['end_added_p99_ms']:.2f} | {row['events_per_write']:.2f} "
            f"| {row['events_per_s']:.0f} |"
        )
    for other in ("floor", "aiohttp", "workers", "ours, two URLs"):
        if other in rows and "ours" in rows:
            ratio = {key: rows["ours"][key] / rows[other][key] for key in ("cpu_us", "ttft_added_p99_ms")}
            print(
                f"ours / {WORDS.get(other, other)}: CPU {ratio['cpu_us']:.2f}, TTFT p99 {ratio['ttft_added_p99_ms']:.3f}"
            )


def sink_speed(sink):
    """Drain the sink with raw sockets: events/s when late (many in a write), and how late it is when it is not."""
    import selectors

    for tpot_ms, streams, events in ((10, 1000, 400), (3.3, 1000, 1000), (2.5, 1000, 1000)):
        with running_sink(sink, 100, tpot_ms) as port:
            os.sched_setaffinity(0, {CLIENT_CORE})
            selector, body = selectors.DefaultSelector(), b'{"prompt":[1],"max_tokens":%d}' % events
            for _ in range(streams):
                peer = socket.create_connection(("127.0.0.1", port))
                peer.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                selector.register(peer, selectors.EVENT_READ, [0])
            left = streams
            while left:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 18)
                    if data.endswith(b"\r\n0\r\n\r\n"):
                        selector.unregister(key.fileobj)
                        left -= 1
            rows = sink_log(port)
            events_per_s = steady_events_per_s(rows)
            print(
                f"TPOT {tpot_ms} ms, {streams} streams: {events_per_s:.0f} events/s, "
                f"{events_per_s * rows[:, 5].sum() / rows[:, 4].sum():.0f} writes/s"
            )


def watch_memory(sink, options):
    """Run our client for minutes; print its memory every 10 s, and the last third against the first."""
    per_s = options.events_per_s / options.tokens
    with running_sink(sink, options.ttft_ms, options.tpot_ms) as port:
        process = subprocess.Popen(
            [sys.executable, __file__, "--one", "ours", "--port", str(port), "--per-s", str(per_s)]
            + ["--seconds", str(60 * options.memory_minutes), "--tokens", str(options.tokens), "--same-ids"],
            stdout=subprocess.PIPE,
        )
        seen, begin = [], time.monotonic()
        while process.poll() is None:
            time.sleep(10)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                seen.append((time.monotonic() - begin, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
                print(f"{seen[-1][0]:.0f} s: {seen[-1][1]:.1f} MiB", flush=True)
        print(process.stdout.read().decode())
    steady = [mib for at_s, mib in seen if at_s > 60][:-3]
    third = len(steady) // 3
    print(
        f"first third {statistics.mean(steady[:third]):.1f} MiB, last {statistics.mean(steady[-third:]):.1f} MiB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events-per-s", type=int, default=50000)
    parser.add_argument("--tokens", type=int, default=400, help="events of an answer")
    parser.add_argument("--seconds", type=float, default=16, help="requests start during this time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ttft-ms", type=float, default=200)
    parser.add_argument("--tpot-ms", type=float, default=10)
    parser.add_argument("--only", action="append", help="one client; may be repeated")
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--memory-minutes", type=float)
    for name, kind in (("--one", str), ("--port", int), ("--per-s", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--same-ids", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.port, options.per_s, options.seconds, options.tokens, options.same_ids)
        return
    missing = [name for name in ("httpx", "orjson", "requests", "zmq") if not importlib.util.find_spec(name)]
    if missing and not (options.sink or options.memory_minutes or options.only):
        parser.error(f"{', '.join(missing)} missing: pip install -e '.[bench]', or --only ours")
    with tempfile.TemporaryDirectory() as folder:
        sink = build_sink(Path(folder))
        if options.sink:
            sink_speed(sink)
        elif options.memory_minutes:
            watch_memory(sink, options)
        else:
            compare(sink, options)


if __name__ == "__main__":
    main()
