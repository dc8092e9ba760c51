"""Length shapes and their CSV file."""

import hashlib

import numpy as np
import pytest

from disagg_lib.errors import LengthsError
from disagg_lib.serving.lengths import (
    built_in_lengths,
    data_set_lengths,
    known_outputs,
    output_tokens_at,
    read_histogram,
    read_lengths_csv,
    scale_outputs,
    write_lengths_csv,
)


def test_built_in_lengths_are_the_same_bytes_everywhere():
    digest = hashlib.sha256(built_in_lengths().tobytes()).hexdigest()
    assert digest == "c929dab3ee509911a97431d0a369a4b158486d1f2db4f9c17e9935b043cc6f20"


@pytest.mark.parametrize("mean", [1000, 9400, 13_000])  # the ends of what prompt_mean_tokens may be
@pytest.mark.parametrize("cv", [0.30, 0.40, 0.50])
def test_input_shape_has_the_stated_mean_and_spread(mean, cv):
    inputs = built_in_lengths(mean=mean, cv=cv)["input_tokens"]
    assert inputs.mean() == pytest.approx(mean, rel=2e-4)
    assert inputs.std() / inputs.mean() == pytest.approx(cv, rel=2e-3)
    assert inputs.min() >= 400 and inputs.max() <= 20000


def test_output_shape_has_the_published_percentiles_and_ignores_the_input():
    lengths = built_in_lengths(8000)
    found = np.percentile(lengths["output_tokens"], [1, 5, 10, 25, 50, 75, 90, 95, 99])
    assert found == pytest.approx([186, 205, 215, 438, 706, 817, 900, 960, 1042], abs=1)
    assert abs(np.corrcoef(lengths["input_tokens"], lengths["output_tokens"])[0, 1]) < 0.02
    assert output_tokens_at(0.5) == 706


def test_shortened_outputs_keep_inputs_and_shape():
    lengths = built_in_lengths()
    short = scale_outputs(lengths, 64)
    assert short["output_tokens"].mean() == pytest.approx(64, abs=0.1)
    assert (short["input_tokens"] == lengths["input_tokens"]).all()
    assert scale_outputs(lengths, 1)["output_tokens"].min() == 2


def test_csv_round_trip(tmp_path):
    lengths = built_in_lengths(100)
    write_lengths_csv(lengths, tmp_path / "l.csv")
    assert (read_lengths_csv(tmp_path / "l.csv") == lengths).all()
    assert (tmp_path / "l.csv").read_text().startswith("input_tokens,output_tokens\n")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no column"),
        ("input_tokens\n1\n", "no column output_tokens"),
        ("input_tokens,output_tokens\n", "no samples"),
        ("input_tokens,output_tokens\n10,5\n10,1\n", "line 3: found 10,1"),
        ("input_tokens,output_tokens\n1.5,9\n", "line 2: found 1.5,9"),
        ("input_tokens,output_tokens\n10\n", "line 2: found 10,None"),
    ],
)
def test_bad_csv_says_file_line_and_need(tmp_path, text, word):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(LengthsError, match=word) as error:
        read_lengths_csv(tmp_path / "l.csv")
    assert "l.csv" in str(error.value)


def test_a_histogram_replaces_the_prompt_shape_and_nothing_else(tmp_path):
    (tmp_path / "h.csv").write_text("up_to_tokens,samples\n1000,0\n2000,30\n8000,10\n")
    lengths = built_in_lengths(4000, input_histogram=read_histogram(tmp_path / "h.csv"))
    assert (lengths["input_tokens"] <= 2000).mean() == pytest.approx(0.75, abs=0.001)
    assert lengths["input_tokens"].mean() == pytest.approx(0.75 * 1500 + 0.25 * 5000, rel=0.001)
    assert (lengths["output_tokens"] == built_in_lengths(4000)["output_tokens"]).all()


def test_the_data_set_takes_its_lengths_from_either_kind_of_file(tmp_path):
    (tmp_path / "h.csv").write_text("up_to_tokens,samples\n1000,0\n2000,30\n8000,10\n")
    assert data_set_lengths(tmp_path / "h.csv")["input_tokens"].max() <= 8000
    lengths = built_in_lengths(seed=1)
    write_lengths_csv(lengths, tmp_path / "l.csv")
    assert (data_set_lengths(tmp_path / "l.csv") == lengths).all()
    assert (data_set_lengths() == built_in_lengths()).all()
    with pytest.raises(LengthsError, match=r"none.csv: cannot be read"):
        data_set_lengths(tmp_path / "none.csv")


def test_lengths_of_another_data_set_or_in_another_order_are_refused(tmp_path):
    lengths = built_in_lengths()
    write_lengths_csv(lengths[:100], tmp_path / "few.csv")
    with pytest.raises(LengthsError, match="100 rows; the data set has 8313 samples"):
        data_set_lengths(tmp_path / "few.csv")
    write_lengths_csv(lengths[np.random.RandomState(1).permutation(len(lengths))], tmp_path / "mixed.csv")
    with pytest.raises(LengthsError, match="not in the data set's order"):
        data_set_lengths(tmp_path / "mixed.csv")


def test_published_outputs_stand_at_their_samples():
    known = known_outputs()
    assert (known > 0).sum() == 485 and known[71] == 695
    assert (built_in_lengths(seed=3)["output_tokens"][known > 0] == known[known > 0]).all()


@pytest.mark.parametrize("mean", [9000, 9800])
def test_another_mean_of_the_prompts_keeps_their_spread(mean):
    inputs = built_in_lengths(mean=mean)["input_tokens"]
    assert inputs.mean() == pytest.approx(mean, abs=0.5)
    assert inputs.std() / inputs.mean() == pytest.approx(0.40, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no column"),
        ("tokens,samples\n1,2\n", "no column up_to_tokens"),
        ("up_to_tokens,samples\n1000,5\n", "line 2: found 1000,5"),
        ("up_to_tokens,samples\n1000,0\n900,3\n", "line 3: found 900,3"),
        ("up_to_tokens,samples\n1000,0\n2000,nan\n", "line 3: found 2000,nan"),
        ("up_to_tokens,samples\n1000,0\n2000,0\n", "no samples"),
        ("up_to_tokens,samples\n1000,x\n", "line 2: found 1000,x"),
    ],
)
def test_a_bad_histogram_says_what_is_needed(tmp_path, text, word):
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(LengthsError, match=word):
        read_histogram(tmp_path / "h.csv")
