"""The search in the time that it has, interrupted and resumed."""

import pytest
from search_runs import line

from disagg_lib.job import margins, search, trials
from disagg_lib.job.search import find_target_qps


def test_interrupted_search_repeats_no_trial(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []
    whole = find_target_qps(line(3.85, calls=calls), 1.0, 10.0, rows_path=path)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(calls) == whole["trials"]
    path.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third row
    again = []
    assert find_target_qps(line(3.85, calls=again), 1.0, 10.0, rows_path=path) == whole
    assert again == calls[2:]


def test_search_interrupted_after_a_repeated_trial_repeats_none(tmp_path):
    """Its second verdict counts from the start."""
    path, calls = tmp_path / "rows.jsonl", []

    def trial(qps, queries):
        row = line(24.0, calls=calls, floor=0.13)(qps, queries)
        return {**row, "ttft_share": 2.48, "valid": False} if len(calls) == 1 else row

    whole = find_target_qps(trial, 8.0, 60.0, rows_path=path)
    lines = path.read_text().splitlines(keepends=True)
    repeated = calls.index(calls[0], 1)
    assert '"repeated": true' in lines[repeated]
    for kept in range(1, len(lines)):
        path.write_text("".join(lines[:kept]))
        again = [None]  # no first trial: the server is warm now
        assert find_target_qps(line(24.0, calls=again, floor=0.13), 8.0, 60.0, rows_path=path) == whole
        assert again[1:] == calls[kept:]


def test_no_trial_begins_that_passes_the_time_budget():
    found = find_target_qps(line(3.85), 1.0, 10.0, budget_s=2000)
    assert found["seconds"] <= 2000 and found["ended"] == "time budget"
    assert found["edge_qps"] == pytest.approx(3.85, rel=0.1)


@pytest.mark.parametrize("low, high, edge", [(1.0, 10.0, 1.05), (5.0, 5.9, 5.05)])
def test_budget_that_ends_a_search_leaves_what_was_seen_valid(low, high, edge):
    found = find_target_qps(line(edge), low, high, budget_s=500)
    assert found["ended"] == "time budget" and not found["seen_valid"]
    assert 0.97 * low < found["target_qps"] <= low


def test_budget_in_which_nothing_was_valid_is_an_error():
    with pytest.raises(margins.SearchError, match="1 trials fitted .* none VALID .* Raise time_limit"):
        find_target_qps(line(0.9), 1.0, 10.0, budget_s=500)


def test_trial_that_the_time_was_too_short_for_is_named():
    calls = []
    find_target_qps(line(0.9, floor=0.95, calls=calls), 1.0, 10.0)
    (_, (qps, queries), *_) = calls
    with pytest.raises(
        margins.SearchError, match=rf"the next, {queries} queries at {qps}/s, .* take \d+ s more"
    ):
        find_target_qps(line(0.9, floor=0.95), 1.0, 10.0, budget_s=500)


@pytest.mark.parametrize("budget_s", [3000, 4000, 4900])
def test_budget_that_ends_a_search_leaves_no_target_that_a_longer_trial_found_invalid(budget_s):
    """What short trials call VALID lies a seventh higher here."""

    def trial(qps, queries):
        calls.append((qps, queries))
        return line(3.6 if queries == 8313 else 4.1)(qps, queries)

    calls = []
    found = find_target_qps(trial, 2.3, 6.2, budget_s=budget_s)
    assert found["ended"] == "time budget" and found["target_qps"] < 4.0
    assert all(trial(*call)["valid"] for call in calls[:] if call[0] <= found["target_qps"])


@pytest.mark.parametrize("edge", [1.2, 1.6, 2.4, 3.85, 6.0])
@pytest.mark.parametrize("steepness", [3.0, 40.0])
@pytest.mark.parametrize("time_s", [9000, 13680, 30000])
def test_runs_at_the_target_still_fit_into_the_job(edge, steepness, time_s):
    """The less the servers can do, the longer the runs after the search last."""
    after = [(8313, 600), (8313, 0)]
    try:
        found = find_target_qps(line(edge, steepness), 2.31, 6.16, time_s=time_s, runs_after=after)
    except margins.SearchError as error:
        assert time_s < 3 * 8313 / edge and "Raise time_limit" in str(error)
    else:
        assert found["seconds"] + search.seconds_of(after, found["target_qps"]) <= 1.02 * time_s


@pytest.mark.parametrize("bad", ["", "{", "[1]", '{"qps": 1.0}', '{"qps": 0, "queries": 0, "seconds": 1}'])
def test_row_that_is_none_is_named_with_its_place(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    find_target_qps(line(3.85), 1.0, 10.0, rows_path=path)
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first + bad + "\n" + "".join(rest))
    with pytest.raises(
        margins.SearchError, match=r"rows\.jsonl, line 2: not a trial's row .* Remove that line"
    ):
        find_target_qps(line(3.85), 1.0, 10.0, rows_path=path)


def test_rows_of_an_earlier_job_cost_no_time_of_this_one(tmp_path):
    path, seconds = tmp_path / "rows.jsonl", find_target_qps(line(3.85), 1.0, 10.0)["seconds"]
    first, again = (
        find_target_qps(line(3.85), 1.0, 10.0, rows_path=path, budget_s=0.8 * seconds) for _ in range(2)
    )
    assert first["ended"] == "time budget" and again["ended"] == "resolution reached"
    assert again["trials"] > first["trials"] and again["seconds"] == seconds


def test_full_length_trial_lasts_as_long_as_its_run(tmp_path):
    """LoadGen issues all samples again until 600 s are over: 72 GPUs at 17 queries/s do so twice."""
    client = {"data_set": {"kind": "synthetic"}, "total_sample_count": 8313}
    for name, queries in (("full", 8313), ("short", 1496)):
        trials.write_trial(tmp_path, tmp_path / name, client, 17.0, queries, 600)
    lines = [(tmp_path / name / "user.conf").read_text().splitlines() for name in ("full", "short")]
    assert "*.Server.min_duration = 600000" in lines[0] and "*.Server.min_duration = 1" in lines[1]
    assert (
        search.seconds_of([(8313, 600)], 17.0) == 2 * 8313 / 17
        and search.seconds_of([(8313, 600)], 2.0) == 8313 / 2
    )
    whole = find_target_qps(line(17.0), 10.0, 30.0)
    assert whole["ended"] == "resolution reached"
    cut = find_target_qps(line(17.0), 10.0, 30.0, full_s=600, budget_s=whole["seconds"] + 1)
    assert cut["ended"] == "time budget"


def test_time_that_trials_take_beside_their_queries_is_allowed_for():
    """Preparing the real data set takes a client 14 s before its own seconds begin."""
    after = [(8313, 600), (8313, 0)]
    for time_s in range(8000, 16000, 400):
        clock = [0.0]

        def trial(qps, queries, clock=clock):
            row = line(3.0)(qps, queries)
            row["seconds"] += 40.0
            clock[0] += row["seconds"]
            return row

        found = find_target_qps(trial, 2.31, 6.16, time_s=time_s, runs_after=after)
        assert clock[0] + search.seconds_of(after, found["target_qps"], 40.0) <= time_s * 1.02 + 40
