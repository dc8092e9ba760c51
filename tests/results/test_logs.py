"""Reading LoadGen's files: each figure, each way in which a log can be bad. The logs were written by LoadGen itself."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from disagg_lib.results import logs
from disagg_lib.results.accuracy_log import read_accuracy_log, read_accuracy_txt
from disagg_lib.results.logs import DETAIL, FIGURES, SUMMARY, LogError, read_run

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = Path(__file__).resolve().parents[2] / "../shared/data/mlperf_logs"


def published_runs():
    return sorted(PUBLISHED.glob("*/performance/run_1"))


def needs_published():
    if not published_runs():
        pytest.skip(f"no published logs at {PUBLISHED}: they are not part of this repository")


def copy(tmp_path, name="logs_full/performance"):
    return Path(shutil.copytree(DATA / name, tmp_path / "odd name, 'quoted'"))


def values_of(path):
    """Every key and value of a detail log, decoded line by line with plain json: the independent reading."""
    found = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        found.setdefault(entry["key"], entry["value"])
    return found


@pytest.mark.parametrize("name", sorted(p.parent.name for p in DATA.glob("logs_*/performance")))
def test_every_figure_is_the_detail_logs_to_its_last_digit(name):
    folder = DATA / name / "performance"
    run, truth = read_run(folder), values_of(folder / DETAIL)
    compared = 0
    for field, (keys, divisor) in FIGURES.items():
        key = next((key for key in keys if key in truth), None)
        value = getattr(run, field)
        if math.isnan(value):
            assert field in run.missing and run.missing[field]
            continue
        compared += 1
        assert value == float(truth[key]) / divisor
        if divisor == 1e6:  # the ns come back whole
            assert round(value * 1e6) == truth[key]
    assert compared >= 15


@pytest.mark.parametrize(
    ("name", "version"),
    [("logs_4.1.30_offline", "4.1"), ("logs_5.0.15_offline", "5.0"), ("logs_full", "5.1.2"), ("logs_6.0.17_short", "6.0.17")],
)  # fmt: skip
def test_logs_of_every_loadgen_from_4_1_to_6_0_are_read(name, version):
    run = read_run(DATA / name / "performance")
    assert run.loadgen_version.startswith(version) and run.mode == "performance"
    assert run.samples_per_s > 0 and run.error_count == 0


def test_scenarios_without_code_of_their_own_are_read_through_the_table():
    single = read_run(DATA / "logs_resnet50_single_stream/performance")
    multi = read_run(DATA / "logs_resnet50_multi_stream/performance")
    assert single.loadgen_scenario == "SingleStream" and single.latency_p90_ms > 0
    assert multi.query_latency_p99_ms > 0 and "MultiStream" in multi.missing["samples_per_s"]
    assert single.error_count == 1 and "Ran out of generated queries" in single.errors[0]


def test_offline_says_why_it_has_no_token_latencies():
    run = read_run(DATA / "logs_offline/performance")
    assert math.isnan(run.ttft_p99_ms) and "no token latencies in Offline" in run.missing["ttft_p99_ms"]
    assert math.isnan(run.ttft_limit_ms)


def test_accuracy_run_has_no_verdict_of_its_own():
    run = read_run(DATA / "logs_full/accuracy")
    assert (run.mode, run.loadgen_valid) == ("accuracy", "")
    assert run.missing["samples_per_s"] == "an accuracy run has no performance figures"


def test_windows_line_ends_change_nothing(tmp_path):
    folder = copy(tmp_path)
    before = read_run(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_run(folder) == before


def test_first_of_repeated_keys_wins(tmp_path):
    folder = copy(tmp_path)
    path = folder / DETAIL
    text = path.read_text()
    count = next(line for line in text.splitlines() if '"generated_query_count"' in line)
    path.write_text(text.replace(count, count + "\n" + count.replace('"value": 8313', '"value": 1'), 1))
    assert read_run(folder).generated_query_count == 8313


def case_of(folder):
    with pytest.raises(LogError) as caught:
        read_run(folder)
    for word in ("found ", "; needed ", str(folder.name)):
        assert word in str(caught.value)
    return caught.value.case


def test_missing_folder_empty_folder_and_missing_file_are_different_errors(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = copy(tmp_path)
    (folder / SUMMARY).unlink()
    assert case_of(tmp_path / "absent") == "missing_folder"
    assert case_of(empty) == "empty_folder"
    assert case_of(folder) == "missing_file"


def test_other_text_is_not_a_loadgen_log(tmp_path):
    folder = copy(tmp_path)
    (folder / DETAIL).write_text("hello\n")
    assert case_of(folder) == "not_loadgen"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.9, 0.99, 0.999])
def test_detail_log_cut_inside_a_line_is_half_written(tmp_path, share):
    folder = copy(tmp_path)
    raw = (folder / DETAIL).read_bytes()
    (folder / DETAIL).write_bytes(raw[: int(len(raw) * share)])
    assert case_of(folder) == "cut_log"


@pytest.mark.parametrize("kind", ["performance", "accuracy"])
@pytest.mark.parametrize("lines", [40, 60, -1])
def test_whole_lines_without_the_last_ones_are_a_killed_run(tmp_path, kind, lines):
    folder = copy(tmp_path, f"logs_full/{kind}")
    kept = (folder / DETAIL).read_text().splitlines(keepends=True)[:lines]
    (folder / DETAIL).write_text("".join(kept))
    (folder / SUMMARY).write_text("")
    assert case_of(folder) == "killed_run"


@pytest.mark.parametrize("kept", [0, 200, 2000])
def test_half_written_summary_is_refused(tmp_path, kept):
    folder = copy(tmp_path)
    (folder / SUMMARY).write_bytes((folder / SUMMARY).read_bytes()[:kept])
    assert case_of(folder) == "cut_log"


@pytest.mark.parametrize("line", [0, 7, 80, 120])
@pytest.mark.parametrize(
    "damage",
    [lambda text: text[len(text) // 2 :], lambda text: text[: len(text) // 2], lambda text: text[3:],
     lambda text: text[:30] + text[70:], lambda text: "\0" * len(text), lambda text: text[:-1]],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path, line, damage, end):
    folder = copy(tmp_path)
    lines = (folder / DETAIL).read_text().splitlines()
    damaged = [*lines[:line], damage(lines[line]) + end + lines[line + 1], *lines[line + 2 :]]
    (folder / DETAIL).write_text("\n".join(damaged) + "\n")
    assert case_of(folder) == "damaged_line"


@pytest.mark.parametrize("value", ['a "quoted" word', "two\nlines", 'ends with "a quote"', "back\\slash {}"])
def test_messages_that_loadgen_does_not_escape_are_read(tmp_path, value):
    folder = copy(tmp_path)
    text = (folder / DETAIL).read_text()
    line = next(line for line in text.splitlines() if '"num_errors"' in line)
    error = line.replace('"num_errors", "value": 0', f'"error_runtime", "value": "{value}"')
    error = error.replace('"is_error": false', '"is_error": true')
    (folder / DETAIL).write_text(text.replace(line, error + "\n" + line))
    assert read_run(folder).errors == (value,)


def test_a_figure_that_loadgen_could_not_compute_is_named(tmp_path):
    folder = copy(tmp_path)
    text = (folder / DETAIL).read_text()
    key = '"result_completed_tokens_per_second", "value": '
    value = text.split(key)[1].split(",")[0]
    (folder / DETAIL).write_text(text.replace(key + value, key + "-nan"))
    assert case_of(folder) == "bad_value"


@pytest.mark.parametrize("other", ["logs_short", "logs_6.0.17_short", "logs_offline"])
def test_summary_of_another_run_is_refused(tmp_path, other):
    folder = copy(tmp_path)
    shutil.copy(DATA / other / "performance" / SUMMARY, folder / SUMMARY)
    assert case_of(folder) == "mixed_runs"


@pytest.mark.parametrize(
    ("printed", "value", "same"),
    [("0.45", 0.452, True), ("0.46", 0.452, False), ("92345.5", 92345.5, True), ("1.23457e+06", 1234567.0, True),
     ("12", 13, False), ("4500000000", 4500000001, False), ("VALID", "VALID", True), ("Yes", 1.0, False)],
)  # fmt: skip
def test_summary_is_compared_to_the_digits_that_it_prints(printed, value, same):
    assert logs._same(printed, value) is same


def test_errors_that_only_the_summary_reports_are_counted(tmp_path):
    folder = copy(tmp_path)
    text = (folder / SUMMARY).read_text()
    (folder / SUMMARY).write_text(
        text.replace("No errors encountered during test.", "3 ERRORS encountered. See detailed log.")
    )
    assert read_run(folder).error_count == 3


def test_published_figures_equal_their_detail_logs():
    needs_published()
    for folder in published_runs():
        run, truth = read_run(folder), values_of(folder / DETAIL)
        assert run.completed_tokens_per_s == truth.get(
            "result_completed_tokens_per_second", truth.get("result_tokens_per_second")
        )
        assert run.latency_p99_ms * 1e6 == pytest.approx(
            truth["result_99.00_percentile_latency_ns"], rel=1e-15
        )


# -- accuracy


def test_token_ids_are_those_that_json_and_a_loop_give():
    path = DATA / "logs_full/accuracy/mlperf_log_accuracy.json"
    log = read_accuracy_log(path)
    entries = json.loads(path.read_text())
    assert not log.truncated and len(entries) == 64 and log.ids.dtype == np.int32
    for answer, entry in enumerate(entries):
        ids = np.frombuffer(bytes.fromhex(entry["data"]), dtype="<i4")
        assert log.qsl_idx[answer] == entry["qsl_idx"] and log.token_count[answer] == entry["token_count"]
        assert np.array_equal(log.tokens(answer), ids)


def write_log(path, answers, dtype, counts=True):
    entries = []
    for i, ids in enumerate(answers):
        count = f', "token_count" : {len(ids)}' if counts else ""
        data = np.asarray(ids, dtype=dtype).tobytes().hex().upper()
        entries.append(f'{{ "seq_id" : {i}, "qsl_idx" : {i}, "data" : "{data}"{count} }}')
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n")


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_width_of_ids_is_found_with_and_without_token_counts(tmp_path, dtype, counts):
    answers = [[128000, 7, 9, 11], [5, 6], [], [1, 2, 3]]
    write_log(tmp_path / "a.json", answers, dtype, counts)
    log = read_accuracy_log(tmp_path / "a.json")
    assert log.ids.dtype == dtype
    assert [log.tokens(i).tolist() for i in range(4)] == answers


def test_truncated_log_gives_its_whole_answers(tmp_path):
    path = tmp_path / "long.json"
    write_log(path, [list(range(100)) for _ in range(40)], "int32")
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + b"\n\n...\n\n" + raw[-4096:])
    log = read_accuracy_log(path)
    assert log.truncated and set(log.lengths) == {100}
    assert log.qsl_idx.tolist() == [0, 1, 2, 3, 36, 37, 38, 39]


def test_accuracy_log_without_its_end_or_with_odd_hex_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write_log(path, [[1, 2, 3]], "int32")
    good = path.read_text()
    for text, case in (
        (good[:-3], "cut_log"),
        (good.replace("0000", "000", 1), "bad_accuracy"),
        (good.replace("01", "0G"), "bad_accuracy"),
    ):
        path.write_text(text)
        with pytest.raises(LogError) as caught:
            read_accuracy_log(path)
        assert caught.value.case == case


ACCURACY_TXT = "\nResults\n\n{'exact_match': 90.06786234281932, 'rougeL': 21.994593737625706, 'gen_num': 8313, 'tokens_per_sample': 654.0}\n\nhash="


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_accuracy_txt_is_read_with_either_line_end(tmp_path, end):
    digest = hashlib.sha256(b"x").hexdigest()
    path = tmp_path / "accuracy.txt"
    path.write_bytes((ACCURACY_TXT + digest + "\n").replace("\n", end).encode())
    scores = read_accuracy_txt(path)
    assert scores.get("exact_match") == 90.06786234281932 and scores.sha256 == digest
    assert math.isnan(scores.get("bleu"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("{'rouge1': np.float64(44.5), 'tokens_per_sample': 290.1}", "rouge1", 44.5),
        ("{'rouge1': '38.8', 'gen_len': 8167644}", "rouge1", 38.8),
        ("AUC=80.314%, 2000 samples", "AUC", 80.314),
        ("Word Error Rate: 2.06%, accuracy=97.93%", "accuracy", 97.93),
        ('{"exact_match": 81.4, "f1": 90.9}', "f1", 90.9),
    ],
)
def test_accuracy_txt_of_other_models_is_read(tmp_path, text, name, value):
    (tmp_path / "accuracy.txt").write_text(text + "\n")
    assert read_accuracy_txt(tmp_path / "accuracy.txt").get(name) == value


def test_accuracy_txt_never_runs_what_it_holds(tmp_path):
    path = tmp_path / "accuracy.txt"
    path.write_text("{'rougeL': __import__('os').mkdir('made')}\n")
    with pytest.raises(LogError, match="without a score"):
        read_accuracy_txt(path)
