"""Lengths of the data set's prompts and outputs: built-in shapes, assumed since it is not public, or a CSV file's."""

import csv
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import LengthsError
from ..files import DATA

LENGTHS = np.dtype([("input_tokens", "<i4"), ("output_tokens", "<i4")])
SAMPLE_COUNT = 8313  # of the benchmark's data set
MAX_INPUT_TOKENS = 20000
INPUT_RANGE = (400, MAX_INPUT_TOKENS)
INPUT_MEAN, INPUT_CV = 9400, 0.40
MAX_OUTPUT_TOKENS = 2000
# Output tokens at percentiles of 297 published data-set items; the ends (0, 100) are the smallest and largest medians.
PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
OUTPUTS = (180, 186, 205, 215, 438, 706, 817, 900, 960, 1042, 1097)


def output_tokens_at(quantile):
    """Output length at a quantile (0 to 1; number or array) of the built-in shape."""
    return np.floor(np.interp(100 * quantile, PERCENTS, OUTPUTS) + 0.5).astype(int)


@cache
def known_outputs() -> np.ndarray:
    """Output tokens by sample, shape (8313,): medians over the TEST06 logs of 73 v5.1 and v6.0 submissions; 0 where not published."""
    samples, tokens = np.loadtxt(DATA / "output_lengths.csv", int, delimiter=",", skiprows=1, unpack=True)
    known = np.zeros(SAMPLE_COUNT, int)
    known[samples] = tokens
    return known


def _beta_quantiles(quantiles: np.ndarray, mean: float, cv: float) -> np.ndarray:
    """Quantiles of a Beta on INPUT_RANGE, by integrating its density in x = sin^2(angle), where it is bounded."""
    low, high = INPUT_RANGE
    mu = (mean - low) / (high - low)
    sigma = cv * mean / (high - low)
    spread = mu * (1 - mu) / sigma**2 - 1
    a, b = mu * spread, (1 - mu) * spread
    cells = 20000
    angle = (np.arange(cells) + 0.5) * (np.pi / 2 / cells)
    density = np.sin(angle) ** (2 * a - 1) * np.cos(angle) ** (2 * b - 1)
    mass = np.concatenate(([0.0], np.cumsum(density)))
    edges = np.sin(np.arange(cells + 1) * (np.pi / 2 / cells)) ** 2
    return low + (high - low) * np.interp(quantiles, mass / mass[-1], edges)


def built_in_lengths(
    count: int = SAMPLE_COUNT,
    cv: float = INPUT_CV,
    seed: int = 405,
    input_histogram: list[tuple[float, float]] | None = None,
    mean: float = INPUT_MEAN,
) -> np.ndarray:
    """Lengths of `count` samples in the built-in shapes, the same on every machine; another seed is another draw.

    Inputs: Beta scaled to 400..20000, of this mean and coefficient of variation; or, if given, a histogram (`read_histogram`).
    Outputs: piecewise linear through the published percentiles, independent of the input. Both are stratified, at quantiles
    (i + 0.5) / count, then shuffled by RandomState, whose stream numpy has frozen. Of the whole data set, samples whose output is
    published have that.

    Returns
    -------
    array of shape (count,), fields input_tokens and output_tokens (int32).
    """
    quantiles = (np.arange(count) + 0.5) / count
    if input_histogram is None:
        inputs = _beta_quantiles(quantiles, mean, cv)
    else:
        edges, weights = np.array(input_histogram).T
        mass = np.concatenate(([0.0], np.cumsum(weights[1:])))
        inputs = np.interp(quantiles, mass / mass[-1], edges)
    stream = np.random.RandomState(seed)
    lengths = np.empty(count, LENGTHS)
    lengths["input_tokens"] = np.floor(inputs + 0.5)[stream.permutation(count)]
    outputs = output_tokens_at(quantiles)[stream.permutation(count)]
    if count == SAMPLE_COUNT:
        outputs = np.where(known_outputs() > 0, known_outputs(), outputs)
    lengths["output_tokens"] = outputs
    return lengths


def _rows(path: Path, columns: Sequence[str], need: str) -> Iterator[tuple[str, list[float]]]:
    """(place in the file, numbers) of each row of a CSV file; NaN for what is no number, which no check lets pass."""
    try:
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise LengthsError(f"{path}: no column {', '.join(missing)}; needs {need}")
            for row in reader:
                found = [row[name] for name in columns]
                try:
                    values = [float(text) for text in found]
                except (TypeError, ValueError):
                    values = [math.nan] * len(columns)
                said = f"{path}, line {reader.line_num}: found {','.join(map(str, found))}"
                yield f"{said}; needs {need}", values
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"{path}: cannot be read ({error}).") from None


def read_histogram(path: Path) -> list[tuple[float, float]]:
    """Prompt lengths as a histogram, for those who may not show more: CSV with the header up_to_tokens,samples.

    Rows ascend; each counts the samples above the row before and not above its own up_to_tokens. The first row is the lower edge
    and has 0 samples.

    Raises
    ------
    LengthsError : says the line, what was found and what is needed.
    """
    need = "up_to_tokens,samples: edges that ascend from 1, samples of 0 or more, 0 in the first row, the lower edge."
    rows: list[tuple[float, float]] = []
    for message, (edge, samples) in _rows(path, ("up_to_tokens", "samples"), need):
        above = rows[-1][0] if rows else 0.0
        if not (above < edge < 2**31 and 0 <= samples < 1e12) or (not rows and samples):
            raise LengthsError(message)
        rows.append((edge, samples))
    if not sum(samples for _, samples in rows):
        raise LengthsError(f"{path}: no samples in any bin.")
    return rows


def is_histogram(path: Path | str) -> bool:
    """Whether a lengths file is a histogram of prompts, whose order nobody knows; LengthsError if it cannot be read."""
    try:
        return "up_to_tokens" in Path(path).read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"{path}: cannot be read ({error}).") from None


def data_set_lengths(path: Path | str | None = None, seed: int = 405, mean: float = INPUT_MEAN) -> np.ndarray:
    """Lengths of the data set's 8313 samples: the built-in shapes, a file of lengths in sample order, or a histogram of prompts.

    `seed` is the draw where the order is not known, `mean` that of the built-in prompts.

    Raises
    ------
    LengthsError : a file whose count or order is not the data set's, which the published outputs tell.
    """
    if path is None:
        return built_in_lengths(seed=seed, mean=mean)
    if is_histogram(path):
        return built_in_lengths(seed=seed, input_histogram=read_histogram(path))
    lengths = read_lengths_csv(path)
    need = "Make it with `python -m disagg_lib lengths PICKLE --out FILE`, or give a histogram (up_to_tokens,samples)."
    if len(lengths) != SAMPLE_COUNT:
        raise LengthsError(
            f"{path}: {len(lengths)} rows; the data set has {SAMPLE_COUNT} samples, one row each. {need}"
        )
    known = known_outputs() > 0
    agreement = np.corrcoef(lengths["output_tokens"][known], known_outputs()[known])[0, 1]
    if not agreement > 0.5:
        raise LengthsError(
            f"{path}: rows are not in the data set's order: its outputs agree with the published ones of {known.sum()} samples at a"
            f" correlation of {agreement:.2f}, needed 0.5. {need}"
        )
    return lengths


def scale_outputs(lengths: np.ndarray, mean_tokens: float) -> np.ndarray:
    """A copy with outputs scaled to the given mean; never below 2, the least that LoadGen can time."""
    short = lengths.copy()
    outputs = lengths["output_tokens"]
    short["output_tokens"] = np.maximum(2, np.floor(outputs * (mean_tokens / outputs.mean()) + 0.5))
    return short


def length_draws(
    count: int, mean_outputs: float | None = None, cv: float = INPUT_CV, mean: float = INPUT_MEAN
) -> tuple[np.ndarray, ...]:
    """Draws of the built-in shapes; outputs scaled to `mean_outputs` if given (else mean 630)."""
    draws = (built_in_lengths(cv=cv, seed=405 + k, mean=mean) for k in range(count))
    return tuple(scale_outputs(lengths, mean_outputs) if mean_outputs else lengths for lengths in draws)


def write_lengths_csv(lengths: np.ndarray, path: Path) -> None:
    """Write one row a sample, in sample order, under the header input_tokens,output_tokens."""
    rows = "".join(f"{i},{o}\n" for i, o in lengths.tolist())
    Path(path).write_text("input_tokens,output_tokens\n" + rows)


def read_lengths_csv(path: Path) -> np.ndarray:
    """Read what write_lengths_csv wrote, or any CSV with these two columns of whole numbers (input >= 1, output >= 2)."""
    need = (
        "the header input_tokens,output_tokens and whole numbers, input_tokens >= 1 and output_tokens >= 2."
    )
    rows = []
    for message, row in _rows(path, LENGTHS.names, need):
        if not all(least <= n < 2**31 and n.is_integer() for least, n in zip((1, 2), row, strict=True)):
            raise LengthsError(message)
        rows.append(tuple(row))
    if not rows:
        raise LengthsError(f"{path}: no samples below the header.")
    return np.array(rows, LENGTHS)
