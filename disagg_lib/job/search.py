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

    python3 job/program search --run-dir RUN --url http://HOST:PORT

reads job/settings.json (its "client", and "find_target_qps": low_qps, high_qps, resolution, budget_s, runs_after, and
end_s, s from the first phase to the end of all), keeps a row for each trial in job/find_target_qps.jsonl, each trial's
files in job/trials/, and the result in job/find_target_qps.json. Run again after an interruption, it goes on from its rows.
"""

import argparse
import collections
import json
import math
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGTERM, signal

from .margins import (
    FAR,
    FLATTEST,
    OFF_IT,
    STEEPNESS,
    SearchError,
    edge_of,
    has_other_verdict_near,
    judge,
    log_share,
    passes,
)
from .rows import Rows
from .trials import run_trial

FULL_QUERIES = 8313
Stage = collections.namedtuple("Stage", "share width near most trust")
# share of a full-length run; a bracket is narrow enough at `width`, an estimate at `near` to a trial (shares of the QPS);
# trials at the most; how far beyond this stage's verdicts the next may be led. The last stage's follow from `resolution`.
STAGES = (Stage(459.0 / FULL_QUERIES, 0.25, 0.10, 4, 0.18), Stage(0.18, 0.15, 0.07, 2, 0.06))

MAX_TRIALS = 8  # of full length
MAX_SHORT = 16  # of a shorter one, while nothing is known on one side of the edge

LOOSE = 2.7  # an edge further than this many resolutions from the nearest full-length trial wants one more than two


def seconds_of(runs, qps, overhead_s=0.0):
    """Return how long runs, (queries, least seconds) each, take one after the other at that QPS, each with its overhead.

    LoadGen issues all samples once more until the least time is over.
    """
    seconds = 0.0
    for queries, least_s in runs:
        seconds += max(1, math.ceil(least_s * qps / queries)) * queries / qps + overhead_s
    return seconds


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
