"""The `lengths` command: lengths only, and no pickle opened that is neither known nor trusted."""

import json
import struct

import pandas as pd
import pytest
from click.testing import CliRunner

from disagg_lib.command_line import main
from disagg_lib.files import sha256
from disagg_lib.serving.lengths import SAMPLE_COUNT, data_set_lengths, read_lengths_csv


@pytest.fixture(scope="module")
def pickle(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set.pkl"
    frame = pd.DataFrame(
        {"tok_input": [[7] * (400 + i % 100) for i in range(SAMPLE_COUNT)], "input": "a secret text"}
    )
    frame.to_pickle(path)
    return path


def lengths(*words):
    return CliRunner().invoke(main, ["lengths", *map(str, words)])


@pytest.mark.parametrize("known", [True, False])
def test_lengths_come_in_sample_order_and_nothing_of_the_texts(pickle, tmp_path, known):
    trust = ["--sha256", sha256(pickle)] if known else ["--trust-dataset"]
    done = lengths(pickle, "--out", tmp_path / "l.csv", *trust)
    assert done.exit_code == 0, done.output
    assert data_set_lengths(tmp_path / "l.csv")["input_tokens"].tolist() == [
        400 + i % 100 for i in range(SAMPLE_COUNT)
    ]
    assert "secret" not in (tmp_path / "l.csv").read_text() + done.output


def test_outputs_are_those_of_a_whole_accuracy_run_where_one_is_given(pickle, tmp_path):
    log = [
        {
            "seq_id": i,
            "qsl_idx": i,
            "data": struct.pack(f"<{2 + i % 9}i", *range(2 + i % 9)).hex(),
            "token_count": 2 + i % 9,
        }
        for i in range(SAMPLE_COUNT)
    ]
    (tmp_path / "a.json").write_text(json.dumps(log))
    done = lengths(pickle, "--out", tmp_path / "l.csv", "--trust-dataset", "--answers", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert read_lengths_csv(tmp_path / "l.csv")["output_tokens"].tolist() == [
        2 + i % 9 for i in range(SAMPLE_COUNT)
    ]
    (tmp_path / "half.json").write_text(json.dumps(log[:100]))
    done = lengths(
        pickle, "--out", tmp_path / "m.csv", "--trust-dataset", "--answers", tmp_path / "half.json"
    )
    assert done.exit_code == 1 and "answers 100 samples" in done.output


def test_an_unknown_pickle_is_not_opened(tmp_path):
    trap = tmp_path / "trap.pkl"
    trap.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    for words in ([], ["--sha256", "0" * 64]):
        done = lengths(trap, "--out", tmp_path / "l.csv", *words)
        assert done.exit_code == 1 and "not opened, because a pickle runs code" in done.output
    assert not (tmp_path / "ran").exists() and not (tmp_path / "l.csv").exists()


def test_another_data_set_is_refused_and_nothing_is_written(tmp_path):
    pd.DataFrame({"tok_input": [[1, 2]]}).to_pickle(tmp_path / "small.pkl")
    done = lengths(tmp_path / "small.pkl", "--out", tmp_path / "l.csv", "--trust-dataset")
    assert done.exit_code == 1 and "needed are the data set's 8313" in done.output
    assert not (tmp_path / "l.csv").exists()
    (tmp_path / "l.csv").write_text("mine")
    done = lengths(tmp_path / "small.pkl", "--out", tmp_path / "l.csv", "--trust-dataset")
    assert done.exit_code == 1 and (tmp_path / "l.csv").read_text() == "mine"
