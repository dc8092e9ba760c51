"""The highest target QPS that meets the limits, found inside one allocation: servers stay up, the client runs again.

Each trial is a Server run of the measuring client at one target QPS. Its margin is a share: the value that early
stopping lets be the worst (of TTFT, of TPOT) over its limit; at most 1 is VALID. Close to the edge the logarithm of
that share is nearly linear in the logarithm of the QPS, so the margins, not only the verdicts, choose the next point.
A share near 1 may also be a level, as CUDA-graph padding makes them: alone it places no edge. Where a few requests
fail, the trial is INVALID, and the others' latencies lead on. An INVALID trial that no slope explains, as of a server that
was not warm, runs once more; the second verdict counts.

Short trials bracket, longer ones place, full-length ones decide. Seen from the same seed, the edge of 459 queries lies
within 10 % (one sigma) of the edge of 8313, that of 1496 within 7 %; what short trials say bounds what longer ones may be
led to. Drawing N of all samples is way 2 of LoadGen's short runs; none of these runs may stand for a round.

    python3 job/program search --run-dir RUN --url http://HOST:PORT

reads job/settings.json (its "client", and "find_target_qps": low_qps, high_qps, resolution, budget_s, runs_after, and
end_s, s from the first phase to the end of all), keeps a row for each trial in job/find_target_qps.jsonl, each trial's
files in job/trials/, and the result in job/find_target_qps.json. Run again after an interruption, it goes on from its rows.
"""

import argparse
import collections
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGTERM, signal
from typing import Callable, Optional, Sequence

from .margins import (
    FAR,
    FLATTEST,
    OFF_IT,
    STEEPNESS,
    SearchError,
    doubtful,
    edge_of,
    judge,
    other_verdict_near,
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

OUT_OF_TIME = "time budget"
LOOSE = 2.7  # an edge further than this many resolutions from the nearest full-length trial wants one more than two


def seconds_of(runs, qps, overhead_s=0.0):
    """Return how long runs, (queries, least seconds) each, take one after the other at that QPS, each with its overhead.

    LoadGen issues all samples once more until the least time is over.
    """
    return sum(
        max(1, math.ceil(least_s * qps / queries)) * queries / qps + overhead_s for queries, least_s in runs
    )


def stages(full_queries, resolution=0.03):
    """Return [(queries, Stage)]; a full length of less than 918 queries is the only one."""
    last = Stage(1.0, 4 * resolution, 1.3 * resolution, 2, 0.0)
    shorter = STAGES if full_queries >= 2 * 459 else ()
    found = {}
    for stage in shorter + (last,):
        found.setdefault(max(round(stage.share * full_queries), min(459, full_queries)), stage)
    return list(found.items())


def find_target_qps(trial, low_qps, high_qps, **options):
    """Search the edge between VALID and INVALID; parameters as of `Search`.

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
    return Search(trial, low_qps, high_qps, **options).run()


@dataclasses.dataclass
class Search:
    """One search, and where it stands.

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
    log : called with a line on each trial.
    time_s, runs_after : nor one after which less than time_s would not be enough for these runs, (queries, least seconds)
        each, at the highest QPS seen VALID by then.
    full_s : least seconds of a full-length trial, as of the run that it speaks for.
    """

    trial: Callable
    low_qps: float
    high_qps: float
    rows_path: Optional[Path] = None
    resolution: float = 0.03
    budget_s: float = math.inf
    full_queries: int = FULL_QUERIES
    log: Callable = lambda text: None
    time_s: float = math.inf
    runs_after: Sequence = ()
    full_s: float = 0.0

    def __post_init__(self):
        if not 0 < self.low_qps < self.high_qps:
            found = f"low_qps {self.low_qps!r}, high_qps {self.high_qps!r}"
            raise SearchError(f"{found}: needed is 0 < low_qps < high_qps")
        self.rows, self.ended = Rows(self.rows_path), "resolution reached"

    def run(self):
        """Go through the stages, from short trials to those of full length; after a repeated trial, once more."""
        # in this search: what an earlier one ran later must not change the way
        self.seen, self.saw_valid = [], False
        self.edge_qps, self.steepness = self.low_qps, STEEPNESS
        self.least, self.most = 0.0, math.inf  # where shorter trials' verdicts leave the edge
        for queries, stage in stages(self.full_queries, self.resolution):
            self.point = self.edge_qps
            if not self.place_edge(queries, stage):
                return self.run()
            if self.ended == OUT_OF_TIME:
                break
            low, high = self.edge.low, self.edge.high
            if high and not low and high["qps"] <= self.low_qps / 15.9:
                found = f"{high['qps']:g} queries/s, a 16th of target_qps_min, is INVALID too"
                raise SearchError(f"{found}: look at the trials' logs")
            self.least = low["qps"] * math.exp(-stage.trust) if low else 0.0
            self.most = high["qps"] * math.exp(stage.trust) if high else math.inf
        return self.result()

    def place_edge(self, queries, stage):
        """Run trials of one length until they have placed the edge, are enough, or the time is over; return False after `repeats`."""
        self.queries, self.stage, self.is_last = queries, stage, stage.share == 1.0
        self.used, self.counted, self.steps_below = [], 0, 0
        self.is_placed, self.is_open = False, True  # open: the edge may lie further off than LOOSE says
        while self.wants_more() and (row := self.next_row()):
            self.learn(row)
            if self.repeats():
                return False
            self.weigh()
            self.step_off()
        return True

    def repeats(self):
        """Repeat an INVALID trial that no slope explains, if there is one; INVALID again, it explains any other."""
        row = doubtful(self.seen)
        if not row or self.rows.has_confirmed() or not self.has_time_for(row["qps"], row["queries"]):
            return False
        self.log(f"{row!r}: no slope explains it beside the VALID trials: once more")
        self.rows.run(self.trial, row["qps"], row["queries"])
        return True

    def wants_more(self):
        """Return whether the stage may have another trial."""
        more = self.is_last and len(self.used) < MAX_TRIALS and (self.is_open or not self.saw_valid)
        enough = self.is_placed or len(self.used) == MAX_SHORT
        return not enough and (self.counted < self.stage.most or more)

    def next_row(self):
        """Return the row of the trial at `point`; None if this stage has it already, or there is no time for it."""
        qps = self.point = min(float(f"{max(self.point, self.low_qps / 16):.4g}"), self.high_qps)
        if any(row["qps"] == qps for row in self.used):
            return None
        row = self.rows.known(qps, self.queries)
        if row or self.has_time_for(qps, self.queries):
            return row or self.rows.run(self.trial, qps, self.queries)
        self.ended = OUT_OF_TIME
        return None

    def has_time_for(self, qps, queries):
        """Return whether a trial, and the runs after the search, still fit; `needed_s` is what these take."""
        best = self.rows.best() or {"qps": self.low_qps}
        trial_s = seconds_of(
            [(queries, self.full_s * (queries == self.full_queries))], qps, self.rows.overhead_s
        )
        after_s = self.seconds_after(min(qps, best["qps"]))
        over_s, self.needed_s = self.rows.spent_s + trial_s, trial_s + after_s
        return over_s <= self.budget_s and over_s + after_s <= self.time_s

    def seconds_after(self, qps):
        """Return how long the runs after the search take at that QPS."""
        return seconds_of(self.runs_after, qps, self.rows.overhead_s)

    def learn(self, row):
        """Take a trial in, and say where the edge lies now."""
        self.used.append(row)
        self.seen.append(row)
        judge(self.seen)
        self.saw_valid = any(map(passes, self.seen))
        edge = self.edge = edge_of(self.used, self.steepness)
        # A verdict of this length that contradicts what shorter trials said frees that side.
        self.least = 0.0 if edge.high and edge.high["qps"] < 1.03 * self.least else self.least
        self.most = math.inf if edge.low and edge.low["qps"] > 0.97 * self.most else self.most
        # Short trials are cheap: until both sides are known they go on.
        both_known = (edge.low or self.least) and (edge.high or self.most < math.inf)
        self.counted += self.stage is not STAGES[0] or bool(both_known)
        self.steepness = edge.steepness if len(self.used) > 1 else self.steepness
        self.point = self.edge_qps = min(max(edge.estimate, self.least), self.most)
        self.log(f"{row!r}: edge near {self.edge_qps:.4g}")

    def weigh(self):
        """Say how well the edge is known: placed as well as this length of trials can, near a trial, or still open."""
        edge = self.edge
        away = abs(math.log(self.edge_qps / edge.near["qps"]))
        width, loose = self.stage.width, LOOSE * self.resolution
        if edge.low and edge.high:
            if self.is_last and edge.share >= FAR:  # a cliff, or failures: verdicts alone tell
                width, loose = 2 * self.resolution, self.resolution
            is_narrow = edge.high["qps"] / edge.low["qps"] < 1 + width
            self.is_near = away < self.stage.near and edge.share < FAR
        else:  # one side only: near, if even the flattest curve leads no further
            is_narrow = bool(edge.low) and edge.low["qps"] >= self.high_qps
            self.is_near = edge.share / FLATTEST < self.stage.near
        # Below the limit, shorter trials' word will do; above it, the target would never have been seen VALID.
        others = self.used if self.is_last and not passes(edge.near) else self.seen
        is_edge = is_narrow or self.is_near and (edge.rises or other_verdict_near(others, edge.near))
        self.is_placed = is_edge and (self.saw_valid or not self.is_last)
        self.is_open = not self.is_placed and (self.is_near or len(self.used) == 1 or away > loose)

    def step_off(self):
        """Go off a share near the limit, which may be a level; otherwise the next trial runs at the edge."""
        if self.is_near and passes(self.edge.near):
            self.point = self.edge.near["qps"] * OFF_IT
        elif self.is_near and not self.is_last:
            self.point = self.edge_qps / OFF_IT
        elif self.is_near:  # the target, then ever further below
            self.point = self.edge_qps * 0.98 ** (2**self.steps_below)
            self.steps_below += 1

    def result(self):
        """Return what the trials say; an error if they say nothing."""
        rows, edge_qps = self.rows.rows, min(self.edge_qps, self.high_qps)
        failing = sum(bool(row.get("failed")) for row in rows)
        self.refuse_without_valid(failing)
        full = [row for row in self.rows.standing() if row["queries"] == self.full_queries]
        valid = (row["qps"] for row in full if row["valid"] and row["qps"] <= edge_qps)
        highest = max(valid, default=0.0)
        seen_valid = highest >= 0.96 * edge_qps
        ended = self.ended
        if ended != OUT_OF_TIME and highest == self.high_qps:
            ended = "high_qps is VALID"
        elif ended != OUT_OF_TIME and self.is_open:
            ended = f"no nearer after {len(self.used)} full-length trials"
        if failing:
            ended += f"; requests failed in {failing} trials, which makes any run INVALID: see job/trials"
        return {
            "target_qps": highest if seen_valid else self.unseen_target(edge_qps, full),
            "seen_valid": seen_valid,
            "edge_qps": edge_qps,
            "queries": self.seen[-1]["queries"] if self.seen else None,
            "trials": len(rows),
            "total_queries": sum(row.get("issued", row["queries"]) for row in rows),
            "seconds": round(sum(row["seconds"] for row in rows), 3),
            "ended": ended,
        }

    def refuse_without_valid(self, failing):
        """Raise if no trial gives a target."""
        rows = self.rows.rows
        if self.ended == OUT_OF_TIME and not self.rows.best():
            found = f"{len(rows)} trials fitted into the time, none VALID (or a longer one was INVALID there); the next, "
            found += f"{self.queries} queries at {self.point:g}/s, and the runs after it take {self.needed_s:.0f} s more"
            raise SearchError(f"{found}. Raise time_limit (and search_budget_s), or lower target_qps_min")
        if not any(row["valid"] for row in rows):
            found = f"{len(rows)} trials, down to {min(row['qps'] for row in rows):g} queries/s, none VALID"
            found += f"; in {failing} of them requests failed"
            raise SearchError(f"{found}: look at the trials' logs, or lower target_qps_min")

    def unseen_target(self, edge_qps, full):
        """Return the target where no trial of full length was VALID close below the edge."""
        target = float("%.4g" % (0.98 * edge_qps))
        # nor above what another search, with other bounds, saw INVALID
        fails = (row["qps"] for row in full if not passes(row))
        target = min((0.98 * qps for qps in fails if qps <= target), default=target)
        if self.ended != OUT_OF_TIME:
            return target
        best_qps = self.rows.best()["qps"]
        in_time = self.rows.spent_s + self.seconds_after(target) <= self.time_s
        return min(target, best_qps) if in_time else best_qps


def main(arguments):
    """Search with the servers of a job; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--url", required=True, action="append")
    options = parser.parse_args(arguments)
    run_dir = options.run_dir.resolve()
    for number in (SIGTERM, SIGHUP):  # run_trial ends the client then
        signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        settings = json.loads((run_dir / "job" / "settings.json").read_text())
        client, search = settings["client"], settings["find_target_qps"]
        search = {name: value for name, value in search.items() if value is not None}
        phases, end_s = run_dir / "job" / "phases.jsonl", search.pop("end_s", math.inf)
        if phases.exists():
            end_s -= time.time() - json.loads(phases.read_text().partition("\n")[0])["time_s"]
        full_s = search.setdefault("full_s", 0.0)
        search.setdefault("full_queries", client["total_sample_count"])
        result = find_target_qps(
            lambda qps, queries: run_trial(run_dir, client, options.url, qps, queries, full_s),
            rows_path=run_dir / "job" / "find_target_qps.jsonl",
            log=lambda text: print("find_target_qps: " + text, flush=True),
            time_s=end_s,
            **search,
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
