"""The highest target QPS that meets the limits, found inside one allocation: servers stay up, the client runs again.

Each trial is a Server run of the measuring client at one target QPS. Its margin is a share: the value that early
stopping lets be the worst (of TTFT, of TPOT) over its limit; at most 1 is VALID. Close to the edge the logarithm of
that share is nearly linear in the logarithm of the QPS, so the margins, not only the verdicts, choose the next point.
A share near 1 may also be a level, as CUDA-graph padding makes them: alone it places no edge. Where a few requests
fail, the trial is INVALID, and the others' latencies lead on.

Short trials bracket, longer ones place, full-length ones decide. Seen from the same seed, the edge of 459 queries lies
within 10 % (one sigma) of the edge of 8313, that of 1496 within 7 %; what short trials say bounds what longer ones may be
led to. Drawing N of all samples is way 2 of LoadGen's short runs; none of these runs may stand for a round.

Copied into the run folder; Python 3.8+, standard library and numpy.

    python3 find_target_qps.py --run-dir RUN --url http://HOST:PORT

reads job/settings.json (its "client", and "find_target_qps": low_qps, high_qps, resolution, budget_s, runs_after, and
end_s, s from the first phase to the end of all), keeps a row for each trial in job/find_target_qps.jsonl, each trial's
files in job/trials/, and the result in job/find_target_qps.json. Run again after an interruption, it goes on from its rows.
"""

import argparse
import collections
import csv
import json
import math
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from signal import SIGHUP, SIGTERM, signal

import numpy as np

FULL_QUERIES = 8313
Stage = collections.namedtuple("Stage", "share width near most trust")
# share of a full-length run; a bracket is narrow enough at `width`, an estimate at `near` to a trial (shares of the QPS);
# trials at the most; how far beyond this stage's verdicts the next may be led. The last stage's follow from `resolution`.
STAGES = (Stage(459.0 / FULL_QUERIES, 0.25, 0.10, 4, 0.18), Stage(0.18, 0.15, 0.07, 2, 0.06))
# d log share / d log QPS at the edge, where no two trials tell it, and the range that it is kept in
STEEPNESS = 2.7
FLATTEST, STEEPEST = 1.0, 40.0
FAR = 0.9  # beyond this |log share| the share no longer tells how far the edge is
APART = 1.3  # trials so far apart that fail alike do not fail because of their QPS
MAX_STEP = 1.6  # of one trial to the next, as a factor, outside a bracket
MAX_TRIALS = 8  # of full length
MAX_SHORT = 16  # of a shorter one, while nothing is known on one side of the edge
# A share near 1 may be a level: it places the edge only with the other verdict within this factor, and
# the next trial goes further off, by the second.
PLATEAU, OFF_IT = 1.4, 1.1
MOST_FAILED = 0.01  # share of a trial's requests: if more failed, the others' latencies tell of another load
LOOSE = 2.7  # an edge further than this many resolutions from the nearest full-length trial wants one more than two

Edge = collections.namedtuple("Edge", "estimate low high near steepness rises")


class SearchError(Exception):
    """The search cannot start or go on; the message says why and what to do."""


def allowed_over_limit(count):
    """Return how many of count queries may be over a p99 limit (early stopping: confidence 0.99); -1 if none can tell."""
    total, allowed = 0.0, -1
    for over in range(count + 1):
        log_ways = math.lgamma(count + 1) - math.lgamma(over + 1) - math.lgamma(count - over + 1)
        total += math.exp(log_ways + over * math.log(0.01) + (count - over) * math.log(0.99))
        if total > 0.01:
            return allowed
        allowed = over
    return allowed


def share_of_limit(values, limit, count=None):
    """Return the value that must not pass the limit for early stopping to hold, over the limit; None for too few.

    count : queries of the trial, if not every one of them has a value.
    """
    allowed = allowed_over_limit(count or len(values))
    return float(np.sort(values)[len(values) - 1 - allowed]) / limit if allowed >= 0 else None


def passes(row):
    """Return whether a trial counts as one below the edge, which `judge` may have said."""
    return row.get("passes", row["valid"])


def keeps_limits(row):
    """Return whether the latencies of a trial's served requests kept the limits, whatever failed."""
    shares = row["ttft_share"], row["tpot_share"]
    return bool(row.get("failed")) and None not in shares and max(shares) <= 1


def judge(rows):
    """Set each row's `passes`: VALID, or INVALID for failed requests alone that do not tell of too high a QPS.

    They do not if a trial at quite another QPS saw about as large a share of its own fail, and latencies kept the limits.
    """

    def alike(one, other):
        apart = abs(math.log(one["qps"] / other["qps"])) > math.log(0.99 * APART)
        (a, of_a), (b, of_b) = (
            (row.get("failed", 0), row.get("issued", row["queries"])) for row in (one, other)
        )
        return apart and a and b and a <= 3 + 3 * b * of_a / of_b and b <= 3 + 3 * a * of_b / of_a

    for row in rows:
        row["passes"] = row["valid"] or keeps_limits(row) and any(alike(row, other) for other in rows)


def log_share(row):
    """Return the logarithm of a trial's worse share, inside +-FAR."""
    shares = row["ttft_share"], row["tpot_share"]
    if None in shares or (max(shares) <= 1) != passes(row):
        return -0.01 if passes(row) else FAR  # many failed, or a verdict that the shares do not explain
    return min(max(math.log(max(shares)), -FAR), FAR)


class Rows:
    """The trials so far, as JSON lines in a file: a search that was interrupted repeats none of them."""

    def __init__(self, path=None):
        self.path, self.rows = path and Path(path), []
        # s of the trials that ran here; s that the VALID ones took beyond their queries at their QPS, at the most
        self.spent_s = self.overhead_s = 0.0
        if self.path and self.path.exists():
            text = self.path.read_text()
            if text and not text.endswith("\n"):  # killed while writing: that trial runs again
                text = text[: text.rfind("\n") + 1]
                self.path.write_text(text)
            self.rows = [self._read(*numbered) for numbered in enumerate(text.splitlines(), 1)]

    def _read(self, number, line):
        try:
            row = json.loads(line)
            row["qps"] / row["queries"] + row["seconds"], row["valid"], row["ttft_share"], row["tpot_share"]
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            found = f"not a trial's row ({type(error).__name__}: {error})"
            raise SearchError(f"{self.path}, line {number}: {found}. Remove that line") from None
        return row

    def known(self, qps, queries):
        """Return the row of that trial, or None."""
        same = (row for row in self.rows if row["queries"] == queries)
        return next((row for row in same if math.isclose(row["qps"], qps, rel_tol=1e-9)), None)

    def best(self):
        """Return the VALID row of the highest QPS that no INVALID trial, at least as long, contradicts; or None."""
        fails = [row for row in self.rows if not passes(row)]

        def stands(row):
            return not any(f["qps"] <= row["qps"] and f["queries"] >= row["queries"] for f in fails)

        sound = (row for row in self.rows if row["valid"] and stands(row))
        return max(sound, key=lambda row: row["qps"], default=None)

    def run(self, trial, qps, queries):
        """Run a trial and return its row."""
        start = time.monotonic()
        result = trial(qps, queries)
        took_s = time.monotonic() - start
        row = dict({"seconds": round(took_s, 3)}, **result)
        row = dict(row, qps=qps, queries=queries)
        self.rows.append(row)
        took_s = max(took_s, row["seconds"])  # a client prepares its requests before its own seconds begin
        self.spent_s += took_s
        self.overhead_s = max(self.overhead_s, took_s - queries / qps if passes(row) else 0.0)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def edge_of(rows, steepness=STEEPNESS):
    """Return the Edge that trials of one length tell of.

    low, high: the rows on both sides of it, or None; near: of these the one that is nearer to the limit; steepness as
    given where no two rows tell it; rises: whether two rows on one side say that the share is no level.
    """
    rows = sorted(rows, key=lambda row: row["qps"])
    fails = [row for row in rows if not passes(row)]
    below = [row for row in rows if passes(row) and (not fails or row["qps"] < fails[0]["qps"])]
    low, high = below[-1] if below else None, fails[0] if fails else None
    pair = [row for row in (low, high) if row]
    near = min(pair, key=lambda row: abs(log_share(row)))
    if len(pair) < 2:  # one side only: its two nearest trials, if they tell apart
        pair = [row for row in (below[-2:] if below else fails[:2]) if abs(log_share(row)) < FAR]
    rises = False
    if len(pair) == 2:
        slope = (log_share(pair[1]) - log_share(pair[0])) / math.log(pair[1]["qps"] / pair[0]["qps"])
        steepness, rises = min(max(slope, FLATTEST), STEEPEST), slope > FLATTEST / 2 and not (low and high)
    step = min(max(math.exp(-log_share(near) / steepness), 1 / MAX_STEP), MAX_STEP)
    if not (low and high) and abs(log_share(near)) >= FAR:  # the shares do not tell how far it is
        step = MAX_STEP if low else 1 / APART if keeps_limits(high) else 1 / MAX_STEP
    estimate = near["qps"] * step
    if low and high:
        room = (high["qps"] / low["qps"]) ** 0.1
        estimate = min(max(estimate, low["qps"] * room), high["qps"] / room)
    return Edge(estimate, low, high, near, steepness, rises)


def seconds_of(runs, qps, overhead_s=0.0):
    """Return how long runs, (queries, least seconds) each, take one after the other at that QPS, each with its overhead.

    LoadGen issues all samples once more until the least time is over.
    """
    seconds = 0.0
    for queries, least_s in runs:
        seconds += max(1, math.ceil(least_s * qps / queries)) * queries / qps + overhead_s
    return seconds


def has_other_verdict_near(rows, near):
    """Return whether one of rows, at most a factor of PLATEAU beyond the edge from this trial, ended otherwise."""
    factor = PLATEAU if passes(near) else 1 / PLATEAU
    low, high = sorted((near["qps"], near["qps"] * factor))
    return any(passes(row) != passes(near) and low <= row["qps"] <= high for row in rows)


def stages(full_queries, resolution=0.03):
    """Return [(queries, Stage)]; a full length of less than 918 queries is the only one."""
    last = Stage(1.0, 4 * resolution, 1.3 * resolution, 2, 0.0)
    shorter = STAGES if full_queries >= 2 * 459 else ()
    found = {}
    for stage in shorter + (last,):
        found.setdefault(max(round(stage.share * full_queries), min(459, full_queries)), stage)
    return list(found.items())


def find_target_qps(
    trial,
    low_qps,
    high_qps,
    rows_path=None,
    resolution=0.03,
    budget_s=None,
    full_queries=FULL_QUERIES,
    log=None,
    time_s=None,
    runs_after=(),
    full_s=0.0,
):
    """Search the edge between VALID and INVALID.

    Parameters
    ----------
    trial : called as trial(qps, queries); returns a mapping with valid (bool), ttft_share, tpot_share (see above; None
        where unknown) and whatever else the row should keep, such as seconds, and failed, the number of failed requests.
    low_qps, high_qps : where to begin, and the highest QPS to try; low_qps may turn out INVALID.
    rows_path : file of JSON lines that keeps each trial and resumes the search, or None.
    resolution : share of the QPS at which a full-length trial is near enough to the edge. Two such trials are mostly
        enough; there are more while the edge may lie further than LOOSE times this from the nearest.
    budget_s : no trial begins that would pass this sum of the seconds of the trials run now (not of resumed rows).
    full_queries : queries of the trials that decide.
    time_s, runs_after : nor one after which less than time_s would not be enough for these runs, (queries, least seconds)
        each, at the highest QPS seen VALID by then.
    full_s : least seconds of a full-length trial, as of the run that it speaks for.

    Returns
    -------
    dict: target_qps (what to run at full length: a VALID trial of that length within 4 % of the edge, else 2 % below it),
    seen_valid (whether it is such a trial), edge_qps, queries (the length of the trials that placed the edge), trials,
    total_queries, seconds, ended (why). When the time ended it, target_qps is not above a trial that was VALID, and no
    trial at least as long was INVALID there.

    Raises
    ------
    SearchError : bounds that make no sense, nothing VALID (down to a 16th of low_qps), or nothing seen VALID in the time.
    """
    if not 0 < low_qps < high_qps:
        raise SearchError(f"low_qps {low_qps!r}, high_qps {high_qps!r}: needed is 0 < low_qps < high_qps")
    rows, point, steepness, ended = Rows(rows_path), low_qps, STEEPNESS, "resolution reached"
    edge, edge_qps, placed_by, least, most = None, low_qps, None, 0.0, math.inf
    seen = []  # in this search: what an earlier one ran later must not change the way
    for queries, stage in stages(full_queries, resolution):
        used, counted, off, unresolved, loose = [], 0, 0, math.inf, LOOSE * resolution
        is_last = stage.share == 1.0
        while len(used) < MAX_SHORT and (
            counted < stage.most
            or is_last
            and len(used) < MAX_TRIALS
            and (unresolved > loose or not any(map(passes, seen)))
        ):
            point = min(float(f"{max(point, low_qps / 16):.4g}"), high_qps)
            if any(row["qps"] == point for row in used):
                break
            row, best = rows.known(point, queries), rows.best()
            next_s = seconds_of([(queries, full_s * is_last)], point, rows.overhead_s)
            over_s = rows.spent_s + next_s
            after_s = seconds_of(runs_after, min(point, best["qps"] if best else low_qps), rows.overhead_s)
            out_of_budget = budget_s is not None and over_s > budget_s
            if not row and (out_of_budget or time_s is not None and over_s + after_s > time_s):
                ended = "time budget"
                break
            used.append(row or rows.run(trial, point, queries))
            seen.append(used[-1])
            judge(seen)
            edge, placed_by = edge_of(used, steepness), queries
            # A verdict of this length that contradicts what shorter trials said frees that side.
            least = 0.0 if edge.high and edge.high["qps"] < 1.03 * least else least
            most = math.inf if edge.low and edge.low["qps"] > 0.97 * most else most
            # Short trials are cheap: until both sides are known they go on.
            counted += stage is not STAGES[0] or bool((edge.low or least) and (edge.high or most < math.inf))
            point = edge_qps = min(max(edge.estimate, least), most)
            if log:
                log(f"{used[-1]!r}: edge near {edge_qps:.4g}")
            unresolved = abs(math.log(edge_qps / edge.near["qps"]))
            loose = LOOSE * resolution
            blind = abs(log_share(edge.near)) >= FAR
            if edge.low and edge.high:
                steepness = edge.steepness
                # A cliff, or failures: verdicts alone tell.
                width, loose = (2 * resolution, resolution) if is_last and blind else (stage.width, loose)
                narrow = edge.high["qps"] / edge.low["qps"] < 1 + width
                is_near = unresolved < stage.near and not blind
            else:  # one side only: near, if even the flattest curve leads no further
                narrow = bool(edge.low and edge.low["qps"] >= high_qps)
                is_near = abs(log_share(edge.near)) / FLATTEST < stage.near
                if len(used) > 1:
                    steepness = edge.steepness
                else:
                    unresolved = math.inf
            # Below the limit, shorter trials' word will do; above it, the target would never have been seen VALID.
            others = used if is_last and not passes(edge.near) else seen
            placed = narrow or is_near and (edge.rises or has_other_verdict_near(others, edge.near))
            if placed and (not is_last or any(map(passes, seen))):
                unresolved = 0.0
                break
            if is_near:
                unresolved = math.inf
                if passes(edge.near):
                    point = edge.near["qps"] * OFF_IT
                elif not is_last:
                    point = edge_qps / OFF_IT
                else:  # the target, then ever further below
                    point, off = edge_qps * 0.98 ** (2**off), off + 1
        point = edge_qps
        if ended == "time budget":
            break
        if edge.high and not edge.low and edge.high["qps"] <= low_qps / 15.9:
            found = "{:g} queries/s, a 16th of target_qps_min, is INVALID too: look at the trials' logs"
            raise SearchError(found.format(edge.high["qps"]))
        least = edge.low["qps"] * math.exp(-stage.trust) if edge.low else 0.0
        most = edge.high["qps"] * math.exp(stage.trust) if edge.high else math.inf
    best = rows.best()
    if ended == "time budget" and not best:
        found = f"{len(rows.rows)} trials fitted into the time, none VALID (or a longer one was INVALID there); the next, "
        found += f"{queries} queries at {point:g}/s, and the runs after it take {next_s + after_s:.0f} s more"
        raise SearchError(f"{found}. Raise time_limit (and search_budget_s), or lower target_qps_min")
    failing = sum(bool(row.get("failed")) for row in rows.rows)
    if not any(row["valid"] for row in rows.rows):
        lowest = min(row["qps"] for row in rows.rows)
        found = f"{len(rows.rows)} trials, down to {lowest:g} queries/s, none VALID; in {failing} of them requests failed"
        raise SearchError(f"{found}: look at the trials' logs, or lower target_qps_min")
    edge_qps = min(edge_qps, high_qps)
    full = [row["qps"] for row in rows.rows if row["valid"] and row["queries"] == full_queries]
    highest = max((qps for qps in full if qps <= edge_qps), default=0.0)
    seen_valid = highest >= 0.96 * edge_qps
    target = highest if seen_valid else float("%.4g" % (0.98 * edge_qps))
    if not seen_valid:  # nor above what another search, with other bounds, saw INVALID
        fails = (row["qps"] for row in rows.rows if not passes(row) and row["queries"] == full_queries)
        target = min((0.98 * qps for qps in fails if qps <= target), default=target)
    if ended == "time budget":
        if not seen_valid:
            after_s = seconds_of(runs_after, target, rows.overhead_s)
            in_time = time_s is None or rows.spent_s + after_s <= time_s
            target = min(target, best["qps"]) if in_time else best["qps"]
    elif highest == high_qps:
        ended = "high_qps is VALID"
    elif unresolved > loose:
        ended = f"no nearer after {len(used)} full-length trials"
    if failing:
        ended += f"; requests failed in {failing} trials, which makes any run INVALID: see job/trials"
    return {
        "target_qps": target,
        "seen_valid": seen_valid,
        "edge_qps": edge_qps,
        "queries": placed_by,
        "trials": len(rows.rows),
        "total_queries": sum(row.get("issued", row["queries"]) for row in rows.rows),
        "seconds": round(sum(row["seconds"] for row in rows.rows), 3),
        "ended": ended,
    }


def write_trial(run_dir, folder, client, qps, queries, full_s):
    """Make the run folder of one trial: the job's client settings, its own user.conf."""
    (folder / "job").mkdir(parents=True)
    data_set = dict(client["data_set"])
    if "lengths" in data_set:
        data_set["lengths"] = str(run_dir / data_set["lengths"])
    settings = {"client": dict(client, data_set=data_set, user_conf="user.conf")}
    (folder / "job" / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    # A full-length trial lasts as long as the run that it speaks for, and issues every sample equally often.
    is_full = queries == client["total_sample_count"]
    values = {"target_qps": f"{qps:.10g}", "min_duration": max(1, round(1000 * full_s)) if is_full else 1}
    values.update(min_query_count=queries, sample_concatenate_permutation=int(is_full))
    lines = [f"*.Server.{key} = {value}\n" for key, value in values.items()]
    (folder / "user.conf").write_text("".join(lines))


def accepts_connections(url):
    """Return whether something listens at a URL."""
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True


def read_trial(folder, url):
    """Return the row of a finished trial; SearchError if the servers are gone, which says nothing about the QPS."""
    result = json.loads((folder / "job" / "client_performance.json").read_text())
    gone = result["kinds"]["refused"] and not accepts_connections(url)
    if result["status"] != "finished" or gone or not result["done"]:
        raise SearchError(f"{folder}: {'; '.join(result['reasons'])}: are the servers up and well?")
    with open(folder / "job" / "queries_performance.csv", newline="") as file:
        served = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    ttft_ms = np.array([float(row["ttft_ms"]) + float(row["late_ms"]) for row in served])
    streamed_ms = np.array([float(row["latency_ms"]) - float(row["ttft_ms"]) for row in served])
    tpot_ms = streamed_ms / (np.array([int(row["output_tokens"]) for row in served]) - 1)
    issued = result["issued"]
    many_failed = result["failed"] > MOST_FAILED * issued
    return {
        "valid": result["valid_client"] and result["loadgen_validity"] == "VALID",
        "ttft_share": None if many_failed else share_of_limit(ttft_ms, result["ttft_limit_ms"], issued),
        "tpot_share": None if many_failed else share_of_limit(tpot_ms, result["tpot_limit_ms"], issued),
        "seconds": result["wall_s"],
        "issued": issued,
        "failed": result["failed"],
        "client_was_late": result["client_was_late"],
        "folder": folder.name,
    }


def run_trial(run_dir, client, url, qps, queries, full_s=0.0):
    """Run the measuring client once, in a folder of its own below job/trials, and return its row."""
    trials = run_dir / "job" / "trials"
    numbers = [int(path.name) for path in trials.glob("*") if path.name.isdecimal()]
    kept = run_dir / "job" / "find_target_qps.jsonl"  # an earlier job's rows tell of folders of its own
    numbers.append(kept.read_text().count("\n") if kept.exists() else 0)
    folder = trials / f"{1 + max(numbers):02d}"
    write_trial(run_dir, folder, client, qps, queries, full_s)
    command = [sys.executable, str(Path(__file__).with_name("loadgen_client.py")), "--run-dir", str(folder)]
    command += ["--test-mode", "performance", "--url", url, "--progress-mode", "find_target_qps"]
    command += ["--progress", str(run_dir / "job" / "progress.jsonl")]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code not in (0, 1):
        raise SearchError(f"{folder}: the client ended with status {code}; its message is above")
    return read_trial(folder, url)


def main(arguments=None):
    """Search with the servers of a job; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--url", required=True)
    options = parser.parse_args(arguments)
    run_dir = options.run_dir.resolve()
    for number in (SIGTERM, SIGHUP):  # run_trial ends the client then
        signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        settings = json.loads((run_dir / "job" / "settings.json").read_text())
        client, search = settings["client"], settings["find_target_qps"]
        full_s = search.get("full_s", 0.0)
        phases, time_s = run_dir / "job" / "phases.jsonl", search.get("end_s")
        if time_s is not None and phases.exists():
            time_s -= time.time() - json.loads(phases.read_text().partition("\n")[0])["time_s"]
        result = find_target_qps(
            lambda qps, queries: run_trial(run_dir, client, options.url, qps, queries, full_s),
            search["low_qps"],
            search["high_qps"],
            rows_path=run_dir / "job" / "find_target_qps.jsonl",
            resolution=search.get("resolution", 0.03),
            budget_s=search.get("budget_s"),
            full_queries=search.get("full_queries") or client["total_sample_count"],
            log=lambda text: print("find_target_qps: " + text, flush=True),
            time_s=time_s,
            runs_after=search.get("runs_after", ()),
            full_s=full_s,
        )
    except (SearchError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"find_target_qps: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    path = run_dir / "job" / "find_target_qps.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        "find_target_qps: target_qps {target_qps} ({}) after {trials} trials, {seconds} s: {ended}".format(
            "seen VALID" if result["seen_valid"] else "not seen VALID itself", **result
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
