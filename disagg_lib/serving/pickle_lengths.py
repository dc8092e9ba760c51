"""Token lengths out of MLPerf's pickle, on the machine that has it: lengths only, in sample order, nothing of the texts."""

import hashlib
from pathlib import Path

import numpy as np

from ..errors import LengthsError
from ..results.accuracy import first_answers
from .lengths import LENGTHS, SAMPLE_COUNT, built_in_lengths


def read_pickle_lengths(
    path: Path, sha256: str | None, trust: bool, answers: Path | None = None
) -> np.ndarray:
    """Prompt lengths from the pickle's tok_input; output lengths of a run's accuracy log, else as published or by the shape.

    Parameters
    ----------
    sha256, trust : a pickle runs code when it is read, so it is opened only if its checksum is given and right, or it is trusted.
    answers : mlperf_log_accuracy.json of a whole accuracy run.

    Raises
    ------
    LengthsError : not opened, or not the data set.
    """
    try:
        with Path(path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if not (trust or (sha256 and found == sha256.lower())):
                wanted = f", needed is {sha256}" if sha256 else ""
                raise LengthsError(
                    f"{path}: not opened, because a pickle runs code when it is read. Its sha256 is {found}{wanted}. Give it with --sha256 if"
                    " you know this file, or --trust-dataset."
                )
            file.seek(0)
            import pandas as pd

            frame = pd.read_pickle(file, compression=None)
    except OSError as error:
        raise LengthsError(f"{path}: cannot be read ({error}).") from None
    if "tok_input" not in frame or len(frame) != SAMPLE_COUNT:
        raise LengthsError(
            f"{path}: {len(frame)} samples; needed are the data set's {SAMPLE_COUNT}, with tok_input."
        )
    lengths = np.empty(SAMPLE_COUNT, LENGTHS)
    lengths["input_tokens"] = [np.size(ids) for ids in frame["tok_input"]]
    lengths["output_tokens"] = built_in_lengths()["output_tokens"]
    if answers:
        ids = first_answers(answers)[0]
        if sorted(ids) != list(range(SAMPLE_COUNT)):
            raise LengthsError(
                f"{answers}: answers {len(ids)} samples; needed is a whole accuracy run of {SAMPLE_COUNT}."
            )
        lengths["output_tokens"] = [max(2, len(ids[i])) for i in range(SAMPLE_COUNT)]
    return lengths
