"""The prompts of a run as bytes of requests, made before the clock runs."""

import csv
import hashlib
import json
import random
from pathlib import Path

import numpy as np

from .client_settings import ClientError

FIRST_ID, END_ID = 10000, 99999  # synthetic prompts: all ids have five digits, inside Llama 3's 128256
SEED, WARMUP_SEED = 405, 406


class Samples:
    """Prepared requests: parts[index] are the pieces to write after a target's head, input_tokens[index] the prompt's length."""

    def __init__(self, settings, fields=None):
        """fields: what each request says besides the prompt, the limits and the sampling of settings."""
        self.parts, self.input_tokens = {}, {}
        is_chat = settings["endpoint"].endswith("/chat/completions")
        keys = ("model", "temperature", "top_p", "top_k")
        self.constants = {key: settings[key] for key in keys if settings.get(key) is not None}
        # Usage once, at the end: some releases would put it into every chunk.
        self.constants.update(
            stream=True, stream_options={"include_usage": True, "continuous_usage_stats": False}
        )
        self.constants.update({"messages": []} if is_chat else {}, **(fields or {}))
        self.before = b'{"prompt_token_ids":[' if is_chat else b'{"prompt":['

    def add(self, index, ids_text, input_tokens, min_tokens, max_tokens):
        """Prepare sample index; ids_text is the prompt's ids, separated by commas, as bytes or memoryview."""
        limits = {"min_tokens": min_tokens, "max_tokens": max_tokens}
        after = ("]," + json.dumps(dict(self.constants, **limits))[1:]).encode()
        length = len(self.before) + len(ids_text) + len(after)
        self.parts[index] = (b"%d\r\n\r\n%s" % (length, self.before), ids_text, after)
        self.input_tokens[index] = input_tokens

    def add_synthetic(self, path, count):
        """Made-up ids: slices of one text, so that 8313 long prompts take no memory. path: lengths.csv."""
        lengths = read_lengths(path, count)
        for index, (ids_text, pair) in enumerate(
            zip(made_up_ids(SEED, [pair[0] for pair in lengths]), lengths)
        ):
            self.add(index, ids_text, *pair, pair[1])


def made_up_ids(seed, lengths):
    """Yield the ids of prompts of these lengths as text, a slice of one long text each; no two begin alike."""
    width, draw, span = len(b"%d," % FIRST_ID), random.Random(seed).random, END_ID - FIRST_ID + 1
    total = max(lengths) + len(lengths)
    view = memoryview(b"".join(b"%d," % (FIRST_ID + int(draw() * span)) for _ in range(total)))
    for index, length in enumerate(lengths):
        yield view[index * width : (index + length) * width - 1]


def read_lengths(path, count):
    """Return (input tokens, output tokens) of the first count rows of lengths.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) < count:
        raise ClientError(f"{path}: {len(rows)} rows, needed are {count}")
    try:
        return [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows[:count]]
    except (KeyError, TypeError, ValueError) as error:
        raise ClientError(
            f"{path}: needed are columns input_tokens,output_tokens of integers: {error!r}"
        ) from None


def read_prompts(data_set, count):
    """Return the first count prompts of MLPerf's pickle, after its checksum was verified or trust was declared."""
    path, wanted, digest = Path(data_set["path"]), data_set.get("sha256"), hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
        found = digest.hexdigest()
        if wanted and found != wanted.lower():
            raise ClientError(f"{path}: sha256 is {found}, needed is {wanted}: another or a damaged file")
        if not wanted and data_set.get("trust") is not True:
            raise ClientError(
                f"{path}: not opened, because a pickle runs code when it is read. Its sha256 is {found}: give it "
                "as the data set's sha256 if you know this file, or declare trust_dataset: true"
            )
        file.seek(0)
        import pandas  # only this data set needs it

        frame = pandas.read_pickle(file, compression=None)
    if "tok_input" not in frame or len(frame) < count:
        columns = ", ".join(map(str, frame.columns))
        raise ClientError(f"{path}: {len(frame)} samples with {columns}; needed are {count} with tok_input")
    return [np.asarray(prompt, dtype=np.int64).ravel() for prompt in frame["tok_input"][:count]]


def kind_of(data_set):
    """Return data_set.kind, synthetic or pickle."""
    if data_set["kind"] not in ("synthetic", "pickle"):
        raise ClientError(
            f"settings.json: data_set.kind is {data_set['kind']!r}; known are synthetic, pickle"
        )
    return data_set["kind"]


def prepare_samples(run_dir, settings, count, fields=None):
    """Return the Samples of a run that uses the first count samples of its data set."""
    samples, data_set = Samples(settings, fields), settings["data_set"]
    if kind_of(data_set) == "synthetic":
        samples.add_synthetic(run_dir / data_set["lengths"], count)
        return samples
    limits = settings["min_output_tokens"], settings["max_output_tokens"]
    for index, prompt in enumerate(read_prompts(data_set, count)):
        samples.add(index, ",".join(map(str, prompt.tolist())).encode(), len(prompt), *limits)
    return samples
