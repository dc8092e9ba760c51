"""Prompt and output lengths of the data set: the built-in shapes, and the CSV file that carries lengths between parts.

The MLPerf data set itself is not public, so its shapes are a stated assumption (facts on token lengths), fixed before any
comparison and replaceable: every function that needs lengths takes an array, whoever made it.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import LengthsError

LENGTHS = np.dtype([("input_tokens", "<i4"), ("output_tokens", "<i4")])
SAMPLE_COUNT = 8313  # of the benchmark's data set
MAX_INPUT_TOKENS = 20000
INPUT_RANGE = (400, MAX_INPUT_TOKENS)
INPUT_MEAN = 9400
MAX_OUTPUT_TOKENS = 2000
# Percentile -> output tokens of 297 published data-set items; the ends (0, 100) are the smallest and largest medians.
OUTPUT_PERCENTILES = ((0, 180), (1, 186), (5, 205), (10, 215), (25, 438), (50, 706), (75, 817), (90, 900), (95, 960),
                      (99, 1042), (100, 1097))  # fmt: skip


def output_tokens_at(quantile):
    """Output length at a quantile (0 to 1; number or array) of the built-in shape."""
    percent, tokens = zip(*OUTPUT_PERCENTILES, strict=True)
    return np.floor(np.interp(100 * quantile, percent, tokens) + 0.5).astype(int)


def _beta_quantiles(quantiles: np.ndarray, mean: float, cv: float) -> np.ndarray:
    """Quantiles of a Beta on INPUT_RANGE, by integrating its density in x = sin^2(angle), where it is bounded."""
    low, high = INPUT_RANGE
    if not 0.05 <= cv <= 0.7:
        raise LengthsError(f"cv of the prompt length is {cv}; this shape takes 0.05 to 0.7.")
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
    cv: float = 0.45,
    seed: int = 405,
    input_histogram: list[tuple[float, float]] | None = None,
) -> np.ndarray:
    """Lengths of `count` samples in the built-in shapes, the same on every machine.

    Inputs: Beta scaled to 400..20000, mean 9400, coefficient of variation `cv`; or, if given, a histogram (`read_histogram`).
    Outputs: piecewise linear through the published percentiles, independent of the input. Both are stratified, at quantiles
    (i + 0.5) / count, then shuffled by RandomState, whose stream numpy has frozen.

    Returns
    -------
    array of shape (count,), fields input_tokens and output_tokens (int32).
    """
    if count < 1:
        raise LengthsError(f"count is {count}; a data set has at least 1 sample.")
    quantiles = (np.arange(count) + 0.5) / count
    if input_histogram is None:
        inputs = _beta_quantiles(quantiles, INPUT_MEAN, cv)
    else:
        edges, weights = np.array(input_histogram).T
        mass = np.concatenate(([0.0], np.cumsum(weights[1:])))
        inputs = np.interp(quantiles, mass / mass[-1], edges)
    stream = np.random.RandomState(seed)
    lengths = np.empty(count, LENGTHS)
    lengths["input_tokens"] = np.floor(inputs + 0.5)[stream.permutation(count)]
    lengths["output_tokens"] = output_tokens_at(quantiles)[stream.permutation(count)]
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
                yield (
                    f"{path}, line {reader.line_num}: found {','.join(map(str, found))}; needs {need}",
                    values,
                )
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


def data_set_lengths(path: Path | str | None = None, cv: float = 0.45) -> np.ndarray:
    """Lengths of the data set's 8313 samples: the built-in shapes, or a file of lengths or a histogram of prompts.

    A lengths file with more or fewer rows is thinned or repeated evenly.
    """
    if path is None:
        return built_in_lengths(cv=cv)
    try:
        histogram = "up_to_tokens" in Path(path).read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"{path}: cannot be read ({error}).") from None
    if histogram:
        return built_in_lengths(input_histogram=read_histogram(path))
    lengths = read_lengths_csv(path)
    return lengths[np.arange(SAMPLE_COUNT) * len(lengths) // SAMPLE_COUNT]


def shorten_outputs(lengths: np.ndarray, mean_tokens: float) -> np.ndarray:
    """A copy with outputs scaled to the given mean; never below 2, the least that LoadGen can time."""
    short = lengths.copy()
    outputs = lengths["output_tokens"]
    short["output_tokens"] = np.maximum(2, np.floor(outputs * (mean_tokens / outputs.mean()) + 0.5))
    return short


def write_lengths_csv(lengths: np.ndarray, path: Path) -> None:
    """Write one row a sample, in sample order, under the header input_tokens,output_tokens."""
    rows = "".join(f"{i},{o}\n" for i, o in lengths.tolist())
    Path(path).write_text("input_tokens,output_tokens\n" + rows)


def read_lengths_csv(path: Path) -> np.ndarray:
    """Read what write_lengths_csv wrote, or any CSV with these two columns of whole numbers (input >= 1, output >= 2)."""
    need = (
        f"the header {','.join(LENGTHS.names)} and whole numbers, input_tokens >= 1 and output_tokens >= 2."
    )
    rows = []
    for message, (inputs, outputs) in _rows(path, LENGTHS.names, need):
        if not (
            1 <= inputs < 2**31 and 2 <= outputs < 2**31 and inputs.is_integer() and outputs.is_integer()
        ):
            raise LengthsError(message)
        rows.append((inputs, outputs))
    if not rows:
        raise LengthsError(f"{path}: no samples below the header.")
    return np.array(rows, LENGTHS)
