"""Accuracy of known answers: hand-worked cases, rouge-score itself, and accuracy.txt as the checker reads it."""

import hashlib
import json
import multiprocessing

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from disagg_lib import errors
from disagg_lib.results import accuracy, scoring
from disagg_lib.results.accuracy_log import read_accuracy_txt

A, B = "01234567-89ab-cdef-0123-456789abcdef", "ffffffff-ffff-ffff-ffff-ffffffffffff"


@pytest.mark.parametrize(
    "reference, answer, percent",
    [
        (A, f"it is {A}.", 100.0),
        (A, "no id at all", 0.0),
        (A, A.upper(), 100.0),
        # 32 hex digits and 4 dashes: of B's characters only f and - are asked, all of them are in A
        (B, A, 100.0),
        # of A's 36 characters f (twice) and - (four times) occur in B
        (A, B, round(6 / 36 * 100, 2)),
        (f"{A} {B}", A, 100.0),
        (A, f"{A} {B}", 50.0),
        ("none", A, 0.0),
    ],
)
def test_needle_score_counts_characters_of_the_reference(reference, answer, percent):
    assert scoring.niah_em(reference, answer) == percent


@pytest.mark.parametrize(
    "reference, answer, percent",
    [
        ("Paris|The City of Light", "Answer: Paris", 100.0),
        ("Paris|The City of Light", "It is the CITY of\nlight.", 100.0),
        ("Paris", "Answer: Lyon Answer: Paris", 100.0),
        ("Paris", "Answer: Paris Answer: Lyon", 0.0),
        ("Paris", "Par", 100.0),  # part of the reference
        ("Paris", "par", 0.0),
        ("Paris", "", 100.0),  # the reference evaluation counts an empty answer as right
    ],
)
def test_answer_score_follows_the_reference_evaluation(reference, answer, percent):
    assert scoring.qa_em(reference, answer) == percent


def test_rouge_is_rouge_scores_stemmed_rouge_l():
    # 3 of 4 words in order, of 5: precision 3/5, recall 3/4; "cats" and "cat" share their stem
    assert scoring.rouge("the cats sat down", "the cat sat and slept") == pytest.approx(
        100 * 2 * 0.6 * 0.75 / 1.35
    )
    assert scoring.rouge("a b c", "a b c") == 100.0


def test_rouge_equals_the_package_on_random_texts():
    from rouge_score.rouge_scorer import RougeScorer

    draw = np.random.RandomState(7)
    words = np.array(
        [
            "running",
            "runs",
            "the",
            "a",
            "cat",
            "cats",
            "dog",
            "slept",
            "sleeping",
            "quickly,",
            "and.",
            "(or)",
            "42",
        ]
    )
    for _ in range(50):
        reference, answer = (" ".join(draw.choice(words, draw.randint(1, 30))) for _ in range(2))
        expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure
        assert scoring.rouge(reference, answer) == pytest.approx(100 * expected)


WORDS = ["<end>", "the", "cats", "sat", "down", "cat", "and", "slept", "Answer:", "Paris", "Lyon", "."]


@pytest.fixture
def tokenizer_dir(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


def ids(text):
    return [WORDS.index(word) for word in text.split()]


ANSWERS = {0: ids("the cat sat and slept <end>"), 1: ids("Answer: Lyon Answer: Paris"), 2: ids("Lyon . the")}
REFERENCES = pd.DataFrame(
    {"gt_output": ["the cats sat down", "Paris", "Paris"], "metric": ["rouge", "qa_em", "qa_em"]}
)


def write_log(run, answers):
    entries = [
        {
            "seq_id": n,
            "qsl_idx": index,
            "data": np.array(answer, "<i4").tobytes().hex().upper(),
            "token_count": len(answer),
        }
        for n, (index, answer) in enumerate(answers)
    ]
    (run / "mlperf/accuracy").mkdir(parents=True)
    path = run / "mlperf/accuracy/mlperf_log_accuracy.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    return path


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    # in completion order; the second answer to sample 1 does not count
    write_log(run, [(1, ANSWERS[1]), (0, ANSWERS[0]), (2, ANSWERS[2]), (1, ids("Answer: Lyon"))])
    return run


@pytest.fixture
def pickle(tmp_path):
    path = tmp_path / "data.pkl"
    REFERENCES.to_pickle(path)
    return path


def test_run_is_scored_and_accuracy_txt_holds_scores_and_hash(run, pickle, tokenizer_dir):
    seen = []
    result = accuracy.evaluate(
        run, pickle, tokenizer_dir, trust=True, processes=2, progress=lambda *at: seen.append(at)
    )
    assert result["rougeL"] == pytest.approx(100 * 2 * 0.6 * 0.75 / 1.35)
    assert result["exact_match"] == 50.0
    assert (result["gen_num"], result["gen_tok_len"], result["tokens_per_sample"]) == (3, 13, 4.3)
    assert seen[-1] == (3, 3)
    written = read_accuracy_txt(run / "mlperf/accuracy/accuracy.txt")
    assert written.get("rougeL") == result["rougeL"] and written.get("tokens_per_sample") == 4.3
    log = run / "mlperf/accuracy/mlperf_log_accuracy.json"
    assert written.sha256 == hashlib.sha256(log.read_bytes()).hexdigest()


def test_accuracy_txt_has_the_lines_of_published_ones(run, pickle, tokenizer_dir):
    accuracy.evaluate(run, pickle, tokenizer_dir, trust=True, processes=1)
    lines = (run / "mlperf/accuracy/accuracy.txt").read_text().splitlines()
    assert (
        lines[:3] == ["", "Results", ""]
        and lines[3].startswith("{'rougeL': ")
        and lines[4].startswith("hash=")
    )
    assert "np.float64" not in lines[3]


def test_run_without_references_has_token_counts_only(run):
    result = accuracy.evaluate(run)
    assert result["tokens_per_sample"] == 4.3 and "rougeL" not in result
    assert "rougeL and exact_match do not exist" in result["notes"][0]
    assert not (run / "mlperf/accuracy/accuracy.txt").exists()


@pytest.mark.parametrize(
    "ids, first, count, words",
    [
        ([11, 12, 128009], [11], 3, ["True", "True", "True"]),
        ([11, 128009, 13], [11, 128009], 3, ["True", "True", "True"]),
        ([11, 12], [], 2, ["Skipped", "True", "True"]),  # Offline
        ([11, 12], [12], 2, ["False", "True", "True"]),
        ([11, 128009, 128009], [11], 3, ["True", "False", "True"]),
        ([11, 12], [11], 3, ["True", "True", "False"]),
    ],
)
def test_test06_is_judged_by_its_three_rules(tmp_path, ids, first, count, words):
    folder = tmp_path / "mlperf/test06"
    folder.mkdir(parents=True)
    entry = {"data": np.array(ids, "<i4").tobytes().hex().upper(), "token_count": count}
    entry |= {"token_data": np.array(first, "<i4").tobytes().hex()} if first else {}
    (folder / "mlperf_log_accuracy.json").write_text(json.dumps([entry]))
    assert list(accuracy.evaluate(tmp_path).values())[:3] == words
    text = (folder / "verify_accuracy.txt").read_text()
    assert ("TEST06 verification complete" in text) == ("False" not in words)
    assert [line.rpartition(" ")[2] for line in text.splitlines()[:3]] == words


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[\n{ "seq_id" : 0, "qsl',
        '[{"data": "0B000000"}]',
        '[{"data": "0B0", "token_count": 1}]',
        "[\n]",
        '[{"data": "0B000000", "token_count": 1}, {"data": "", "token_count": 0}]',  # a request failed
    ],
)
def test_test06_run_that_was_ended_early_does_not_stand_in_the_way(run, text):
    log = run / "mlperf/test06/mlperf_log_accuracy.json"
    log.parent.mkdir()
    log.write_text(text)
    result = accuracy.evaluate(run)
    assert result["tokens_per_sample"] == 4.3
    assert result["notes"][-1].startswith(f"TEST06 is not judged: {log}: ")
    (run / "mlperf/accuracy/mlperf_log_accuracy.json").unlink()
    with pytest.raises(
        errors.EvaluationError, match="[dD]id the TEST06 run end|1 of 2 samples have no answer"
    ):
        accuracy.evaluate(run)
    assert not log.with_name("verify_accuracy.txt").exists()


def test_id_that_is_no_token_is_named(tmp_path):
    write_log(tmp_path / "run", [(0, ANSWERS[0]), (1, [5, -3])])
    with pytest.raises(errors.EvaluationError, match="sample 1 has the id -3, which is no token"):
        accuracy.evaluate(tmp_path / "run")


def test_scoring_process_that_is_killed_ends_the_evaluation():
    """As the kernel does when memory runs out."""

    def progress(done, of):
        for child in multiprocessing.active_children():
            child.kill()

    text, many = "word " * 200, 3200  # half a minute's work
    with pytest.raises(errors.EvaluationError, match="a scoring process was killed"):
        scoring.evaluate_answers(
            [[1]] * many, [text] * many, ["rouge"] * many, lambda ids: [text] * many, 1, progress
        )


def test_int64_ids_are_refused_and_odd_counts_are_noted(tmp_path):
    log = write_log(tmp_path / "run", [(0, ANSWERS[0]), (1, ANSWERS[1])])
    entries = json.loads(log.read_text())
    for entry, answer in zip(entries, ANSWERS.values(), strict=False):
        entry["data"] = np.array(answer, "<i8").tobytes().hex().upper()
    log.write_text(json.dumps(entries))
    with pytest.raises(errors.EvaluationError, match="its ids are int64. Needed are int32"):
        accuracy.evaluate(tmp_path / "run")
    write_log(tmp_path / "odd", [(7, ANSWERS[0]), (1, ANSWERS[1])])
    log = tmp_path / "odd/mlperf/accuracy/mlperf_log_accuracy.json"
    log.write_text(log.read_text().replace('"token_count": 6', '"token_count": 9'))
    settings = tmp_path / "odd/job/settings.json"
    settings.parent.mkdir()
    settings.write_text('{"client": {"accuracy_sample_count": 3}}')
    assert accuracy.evaluate(tmp_path / "odd")["notes"][1:] == [
        "2 of 3 samples",
        "ids and token_count differ in 1 answers (sample 7: 6 ids, token_count 9)",
    ]


def test_failed_requests_are_not_scored_as_empty_answers(tmp_path):
    write_log(tmp_path / "run", [(0, ANSWERS[0]), (1, [])])
    with pytest.raises(errors.EvaluationError, match="1 samples have no answer .first: 1.: requests failed"):
        accuracy.evaluate(tmp_path / "run")


def test_pickle_is_not_opened_unless_known_or_trusted(run, pickle, tokenizer_dir):
    digest = hashlib.sha256(pickle.read_bytes()).hexdigest()
    with pytest.raises(errors.EvaluationError, match=f"runs code.*{digest}"):
        accuracy.evaluate(run, pickle, tokenizer_dir)
    with pytest.raises(errors.EvaluationError, match="another or a damaged file"):
        accuracy.evaluate(run, pickle, tokenizer_dir, sha256="0" * 64, trust=True)
    assert accuracy.evaluate(run, pickle, tokenizer_dir, sha256=digest, processes=1)["exact_match"] == 50.0


@pytest.mark.parametrize(
    "frame, message",
    [
        (REFERENCES.rename(columns={"metric": "kind"}), "no column metric"),
        (REFERENCES[:2], "2 samples, but the log answers sample 2"),
        (REFERENCES.assign(gt_output=["a", None, "b"]), "sample 1: gt_output is (nan|None), needed is text"),
        (REFERENCES.assign(metric="bleu"), "metric bleu: known are rouge, niah_em, qa_em"),
    ],
)
def test_data_set_that_does_not_fit_is_refused(run, tmp_path, tokenizer_dir, frame, message):
    frame.to_pickle(tmp_path / "other.pkl")
    with pytest.raises(errors.EvaluationError, match=message):
        accuracy.evaluate(run, tmp_path / "other.pkl", tokenizer_dir, trust=True)
    assert not (run / "mlperf/accuracy/accuracy.txt").exists()


def test_missing_tokenizer_is_named(run, pickle, tmp_path):
    with pytest.raises(errors.EvaluationError, match="tokenizer.json: no such file"):
        accuracy.evaluate(run, pickle, tmp_path, trust=True)


def test_decoding_tidies_blanks_as_the_tokenizers_config_says(tokenizer_dir):
    answer = [ids("Paris . <end>")]
    assert scoring.load_decoder(tokenizer_dir)(answer) == ["Paris ."]
    (tokenizer_dir / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    assert scoring.load_decoder(tokenizer_dir)(answer) == ["Paris."]
