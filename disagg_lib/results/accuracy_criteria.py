"""What the accuracy half of a run must meet: its log is of this benchmark, and its scores are of that log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .accuracy_log import AccuracyScores
from .criteria import APART, FAIL, NOT_JUDGED, Claim, Criterion, held, located
from .logs import DETAIL, NAN, MlperfRun
from .rounds import load_rules


@dataclass(frozen=True)
class AccuracyHalf:
    """What there is of an accuracy run."""

    run: MlperfRun | None = None  # LoadGen's files
    scores: AccuracyScores | None = None  # of accuracy.txt
    errors: Mapping[str, str] = field(default_factory=dict)  # accuracy_log | accuracy_txt -> why it cannot be read
    log_there: bool = False  # mlperf_log_accuracy.json
    log_digest: str = ""  # SHA-256; "" if the log is absent or truncated


def accuracy_checks(run: MlperfRun, claim: Claim, model: dict, half: AccuracyHalf) -> Iterator[Criterion]:
    """Every check on the accuracy half; what is absent is not judged, by name."""
    return located("accuracy/accuracy.txt", _all_checks(run, claim, model, half))


def _all_checks(run: MlperfRun, claim: Claim, model: dict, half: AccuracyHalf) -> Iterator[Criterion]:
    for name, error in half.errors.items():
        yield held(name, False, "unreadable", "readable", error)
    if half.run:
        yield from located(f"accuracy/{DETAIL}", _log_checks(run, claim, model, half.run))
    yield from _score_checks(claim, model, half.scores)
    if half.scores:
        yield from _count_checks(run, model, half.scores)
        yield _digest(half)
        if not half.run and "accuracy_log" not in half.errors:
            yield _absent("accuracy_log", "mlperf_log_detail.txt and mlperf_log_summary.txt")


def _absent(name: str, what: str) -> Criterion:
    return Criterion(name, NOT_JUDGED, "absent", what, "", f"Copy {what} from the accuracy run, beside accuracy.txt.")


def _log_checks(run: MlperfRun, claim: Claim, model: dict, accuracy: MlperfRun) -> Iterator[Criterion]:
    """The accuracy run is one, of the same scenario, data set and round, over all samples and without errors."""
    yield held("accuracy_mode", accuracy.mode == "accuracy", accuracy.mode, "accuracy")
    scenarios = accuracy.loadgen_scenario, run.loadgen_scenario
    yield held("accuracy_scenario", scenarios[0] == scenarios[1], *scenarios)
    if model:
        samples = accuracy.dataset_samples
        yield held("accuracy_dataset", samples == model["samples"], samples, model["samples"])
    # accepted runs have the round's seeds or none (0): an accuracy run asks every sample once, in any order
    needed = load_rules()["rounds"][claim.round]["seeds"]
    pairs = zip(accuracy.seeds, needed, strict=True)
    other = next((pair for pair in pairs if pair[0] not in (0, pair[1])), None)
    yield held("accuracy_seeds", not other, *map(str, other or (needed[0], needed[0])))
    # as the checker counts: one published summary reports one that its log lacks
    yield held("accuracy_errors", not accuracy.errors, len(accuracy.errors), 0)
    seen, full = accuracy.generated_samples, accuracy.dataset_samples
    yield held("accuracy_queries", seen >= full, seen, full)


def _score_checks(claim: Claim, model: dict, scores: AccuracyScores | None) -> Iterator[Criterion]:
    """The bounds of the model, which the open division waives."""
    bounds = model.get("accuracy", {})
    if not bounds:
        yield Criterion("accuracy_scores", NOT_JUDGED, NAN, NAN, "", "No bounds are known here.")
    for name, (low, high) in bounds.items():
        figure = scores.get(name) if scores else NAN
        high = math.inf if high is None else high
        todo = f"{name} must be {low:g} to {high:g}. Check the decoding settings and the checkpoint."
        check = held(f"accuracy_{name}", low <= figure <= high, figure, high if figure > high else low, todo)
        if math.isnan(figure):
            check = replace(check, status=NOT_JUDGED, advice="Make the accuracy run and evaluate it.")
        elif claim.division == "open" and check.status == FAIL:
            check = replace(check, status=NOT_JUDGED, advice="The open division waives it.")
        yield check


def _count_checks(run: MlperfRun, model: dict, scores: AccuracyScores) -> Iterator[Criterion]:
    """Samples and tokens of accuracy.txt, against each other and against the performance run."""
    number, tokens, mean = (scores.get(name) for name in ("gen_num", "gen_tok_len", "tokens_per_sample"))
    if model and not math.isnan(number):
        yield held("accuracy_samples", number == model["samples"], number, model["samples"])
    if number > 0 and not math.isnan(tokens + mean):
        fits = abs(tokens / number - mean) <= 0.0500001  # one decimal is written
        yield held("accuracy_token_counts", fits, round(tokens / number, 4), mean)
    if not math.isnan(mean + run.tokens_per_sample):
        fits = math.isclose(run.tokens_per_sample, mean, rel_tol=APART)
        yield held("tokens_per_sample", fits, round(run.tokens_per_sample, 2), mean)


def _digest(half: AccuracyHalf) -> Criterion:
    """accuracy.txt names the whole log that it scores; of a truncated one the digest is MLCommons' to know."""
    name, said = "accuracy_hash", half.scores.sha256
    if not half.log_there:
        return _absent(name, "mlperf_log_accuracy.json")
    if half.log_digest and not said:
        return replace(held(name, False, "no hash= line", half.log_digest), status=NOT_JUDGED)
    return held(name, said == half.log_digest if half.log_digest else bool(said), said, half.log_digest or "hash=...")
