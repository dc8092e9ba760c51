"""The edge between VALID and INVALID, as trials at several QPS tell of it."""

import collections
import itertools
import math

import numpy as np

# d log share / d log QPS at the edge, where no two trials tell it, and the range that it is kept in
STEEPNESS = 2.7
FLATTEST, STEEPEST = 1.0, 40.0
FAR = 0.9  # beyond this |log share| the share no longer tells how far the edge is
APART = 1.3  # trials so far apart that fail alike do not fail because of their QPS
MAX_STEP = 1.6  # of one trial to the next, as a factor, outside a bracket

# A share near 1 may be a level: it places the edge only with the other verdict within this factor, and
# the next trial goes further off, by the second.
PLATEAU, OFF_IT = 1.4, 1.1

Edge = collections.namedtuple("Edge", "estimate low high near share steepness rises")


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


def worst(row):
    """Return a trial's worse share; infinite where one is unknown."""
    shares = row["ttft_share"], row["tpot_share"]
    return math.inf if None in shares else max(shares)


def keeps_limits(row):
    """Return whether the latencies of a trial's served requests kept the limits, whatever failed."""
    return bool(row.get("failed")) and worst(row) <= 1


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
    if (worst(row) <= 1) != passes(row):
        return -0.01 if passes(row) else FAR  # many failed, or a verdict that the shares do not explain
    return min(max(math.log(worst(row)), -FAR), FAR)


def edge_of(rows, steepness=STEEPNESS):
    """Return the Edge that trials of one length tell of.

    low, high: the rows on both sides of it, or None; near: of these the one that is nearer to the limit, share: how far,
    as a logarithm; steepness as given where no two rows tell it; rises: whether two rows on one side say that the share
    is no level.
    """
    rows = sorted(rows, key=lambda row: row["qps"])
    fails = [row for row in rows if not passes(row)]
    below = [row for row in rows if passes(row) and (not fails or row["qps"] < fails[0]["qps"])]
    low, high = below[-1] if below else None, fails[0] if fails else None
    pair = [row for row in (low, high) if row]
    near = min(pair, key=lambda row: abs(log_share(row)))
    share = abs(log_share(near))
    if len(pair) < 2:  # one side only: its two nearest trials, if they tell apart
        pair = [row for row in (below[-2:] if below else fails[:2]) if abs(log_share(row)) < FAR]
    rises = False
    if len(pair) == 2:
        slope = (log_share(pair[1]) - log_share(pair[0])) / math.log(pair[1]["qps"] / pair[0]["qps"])
        steepness, rises = min(max(slope, FLATTEST), STEEPEST), slope > FLATTEST / 2 and not (low and high)
    step = min(max(math.exp(-log_share(near) / steepness), 1 / MAX_STEP), MAX_STEP)
    if not (low and high) and share >= FAR:  # the shares do not tell how far it is
        step = MAX_STEP if low else 1 / APART if keeps_limits(high) else 1 / MAX_STEP
    estimate = near["qps"] * step
    if low and high:
        room = (high["qps"] / low["qps"]) ** 0.1
        estimate = min(max(estimate, low["qps"] * room), high["qps"] / room)
    return Edge(estimate, low, high, near, share, steepness, rises)


def other_verdict_near(rows, near):
    """Return whether one of rows, at most a factor of PLATEAU beyond the edge from this trial, ended otherwise."""
    factor = PLATEAU if passes(near) else 1 / PLATEAU
    low, high = sorted((near["qps"], near["qps"] * factor))
    return any(passes(row) != passes(near) and low <= row["qps"] <= high for row in rows)


def doubtful(rows):
    """Return an INVALID trial whose share no slope explains beside that of a VALID one, at least as long; or None.

    Measured: a cold engine compiled for 10.8 s at 8 queries/s, share 2.48; at 7.5 it had 0.14, and its edge was at 24.
    """
    fails = [row for row in rows if not passes(row)]
    for fail, row in itertools.product(fails, filter(passes, rows)):
        rise = math.log(worst(fail)) - math.log(worst(row))
        explained = max(2 * FAR, STEEPEST * math.log(fail["qps"] / row["qps"]))
        if explained < rise < math.inf and row["queries"] >= fail["queries"]:
            return fail
    return None
