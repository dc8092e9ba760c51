"""Warm-up: waves of completions like the run's own, before the clock, until they bring nothing new. Nothing of it counts.

    python3 job/program client --run-dir RUN --test-mode warmup --url http://HOST:PORT

An engine that is ready is not warm: it compiles and tunes when a batch, a length or a sampling field first comes, and
each pair of servers opens its path with its first transfer. (Seen: 10.8 s without a token in mid-run, INVALID; the
same queries on the same engine once warm, VALID.) So: the client's own requests with made-up prompts, which no cache
knows afterwards, of the data set's lengths, at first two for each pair of servers, then as many at once as the run
will have open. Writes job/client_warmup.json and its lines in job/progress.jsonl; nothing below mlperf/.

Where accuracy or TEST06 is to come, it also finds out whether they can have their ids, while a refusal is cheap.

Exit status: 0 warm, or the limit was reached; 1 the server answers nothing; 2 refused to start.
"""

import asyncio
import functools
import itertools
import json
import time

import numpy as np

from .loadgen import configure
from .prompts import WARMUP_SEED, Samples, kind_of, made_up_ids, read_lengths, read_prompts
from .recorder import Recorder, percentile_ms
from .sender import IDS_MODES, Client, allow_open_files
from .target import Target
from .token_ids import find_way

LIMIT_S = 300.0  # no wave begins that would end later, were it like the one before
MOST_WAVES, FEWEST_OPEN, MOST_OPEN = 12, 8, 1024
ALIKE = 1.2  # two waves of one size are alike up to this ratio
GROWTH = 1.25  # a wave much smaller than what the run will have open says nothing about it
MEAN_OUTPUT_TOKENS = 685  # of the data set; the reference's tokens_per_sample is 684.68


class NoLoadGen:
    """Stands where LoadGen would: nobody counts."""

    @staticmethod
    def QuerySampleResponse(*words):
        return words

    @staticmethod
    def FirstTokenComplete(responses):
        pass

    QuerySamplesComplete = FirstTokenComplete


def lengths_of(run_dir, settings, count):
    """Return (input tokens, output tokens) of count samples, evenly from the whole data set: it is ordered by task."""
    data_set, total = settings["data_set"], settings["total_sample_count"]
    if kind_of(data_set) == "synthetic":
        lengths = read_lengths(run_dir / data_set["lengths"], total)
    else:
        lengths = [(len(prompt), MEAN_OUTPUT_TOKENS) for prompt in read_prompts(data_set, total)]
    return [lengths[place * total // count % total] for place in range(count)]


def pairs_of_servers(settings):
    """Return how many pairs of a context and a generation server there are; 1 behind an external endpoint."""
    roles = [server["role"] for server in settings["servers"]]
    return max(1, roles.count("context") * roles.count("generation"))


def will_be_open(settings, test, latency_s):
    """Return how many requests the run will have open: Little's law, or Offline's own bound."""
    if settings["scenario"] == "Offline":
        return settings["max_in_flight"] or MOST_OPEN
    return round(test.server_target_qps * latency_s)


class Waves:
    """Requests to the endpoint, many at once."""

    def __init__(self, client, recorder):
        self.client, self.recorder = client, recorder
        self.numbers = itertools.count()

    async def send(self, size):
        """Send that many requests at once; return what became of them, as client_warmup.json says it."""
        client, before, failed = self.client, len(self.client.rows), sum(self.client.kinds.values())
        begin_s = time.perf_counter()
        client.begin(
            [(n, n % len(client.samples.parts)) for n in itertools.islice(self.numbers, size)], begin_s
        )
        next_sweep_s = begin_s
        while client.active or client.queued:
            await asyncio.sleep(0.02)
            if time.perf_counter() > next_sweep_s:
                next_sweep_s += 1.0
                self.recorder.lines.put(client.sweep())
        self.recorder.lines.put(client.sweep())
        rows = np.array(client.rows[before:]).reshape(-1, 7)
        _, issue_s, _, first_s, end_s, count, _ = rows[rows[:, 5] > 1].T
        return {
            "requests": size,
            "failed": sum(client.kinds.values()) - failed,
            "seconds": round(time.perf_counter() - begin_s, 3),
            "latency_mean_ms": mean_ms(end_s - issue_s),
            "ttft_max_ms": percentile_ms(first_s - issue_s, 100),
            "tpot_mean_ms": mean_ms((end_s - first_s) / (count - 1)),
        }


def mean_ms(values_s):
    """Return the mean of seconds in ms, None of nothing."""
    return round(1e3 * float(values_s.mean()), 4) if len(values_s) else None


def alike(wave, before):
    """Whether a wave brought nothing new against one of its size: no failure, the same TPOT, no longer wait."""
    if before is None or wave["requests"] != before["requests"] or wave["failed"]:
        return False
    ratio = wave["tpot_mean_ms"] / max(before["tpot_mean_ms"] or 0.0, 1e-6)
    return 1 / ALIKE <= ratio <= ALIKE and wave["seconds"] <= ALIKE * before["seconds"]


async def until_alike(waves, smallest, wanted):
    """Send waves until one is like the one before; return (whether it came to that, the waves).

    smallest: requests of the first wave. wanted: function, a wave's mean latency in s -> requests of the next.
    """
    size, sent = smallest, []
    while len(sent) < MOST_WAVES:
        if sent and sum(wave["seconds"] for wave in sent) + sent[-1]["seconds"] > LIMIT_S:
            break
        sent.append(await waves.send(size))
        wave = sent[-1]
        waves.recorder.log(
            "wave of {requests}: {seconds} s, TPOT {tpot_mean_ms} ms, {failed} failed".format(**wave)
        )
        if wave["failed"] == size:
            break
        larger = min(wanted(wave["latency_mean_ms"] / 1e3), MOST_OPEN)
        if larger > GROWTH * size:
            size = larger
        elif alike(wave, sent[-2] if len(sent) > 1 else None):
            return True, sent
    return False, sent


def prepare_warm_up(run_dir, settings):
    """Return Samples of made-up prompts, more than any wave needs at once."""
    samples, lengths = Samples(settings), lengths_of(run_dir, settings, MOST_OPEN)
    for index, ids_text in enumerate(made_up_ids(WARMUP_SEED, [inputs for inputs, _ in lengths])):
        samples.add(index, ids_text, *lengths[index], lengths[index][1])
    return samples


async def warm_up(run_dir, urls, settings, progress):
    """Warm the servers up; return the exit status."""
    import mlperf_loadgen

    targets, begin_s = [Target(url, settings["endpoint"]) for url in urls], time.perf_counter()
    needs_ids = any(mode in IDS_MODES for mode in settings["test_modes"])
    result = {
        "mode": "warmup",
        "urls": list(urls),
        "ids": find_way(targets[0], settings) if needs_ids else None,
    }
    test = configure(mlperf_loadgen, run_dir, settings, "performance")
    allow_open_files(MOST_OPEN)
    samples, recorder = prepare_warm_up(run_dir, settings), Recorder(progress, "warmup", None, None)
    client = Client(asyncio.get_running_loop(), NoLoadGen, targets, settings, samples, "warmup", recorder.log)
    await client.open_connections(settings["connections"])
    recorder.start()
    smallest = max(FEWEST_OPEN, 2 * pairs_of_servers(settings) * len(urls))  # each front end, to each pair
    wanted = functools.partial(will_be_open, settings, test)
    stable, waves = await until_alike(Waves(client, recorder), smallest, wanted)
    said = "warm" if stable else "not yet steady when the limit was reached"
    if waves[-1]["failed"] == waves[-1]["requests"]:
        said = "no request of a wave was answered; the first failure: " + client.first_failure
    result.update(stable=stable, said=said, seconds=round(time.perf_counter() - begin_s, 3), waves=waves)
    (run_dir / "job/client_warmup.json").write_text(json.dumps(result, indent=1) + "\n")
    recorder.log("%s, after %d waves and %s s" % (said, len(waves), result["seconds"]))
    for connection in client.connections:
        connection.abort()
    recorder.stop()
    return int(waves[-1]["failed"] == waves[-1]["requests"])
