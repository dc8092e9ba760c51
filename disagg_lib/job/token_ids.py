"""How the token ids of answers come: from the server, asked in a way that it knows, or from its text by the tokenizer."""

import array
import json
import socket
import time
from pathlib import Path

from .client_settings import ClientError
from .http_answer import BAD_ANSWER, Answer, AnswerError, failure_of
from .prompts import Samples
from .target import PROBE_IDS, PROBE_TOKENS

# What a request says to get ids. TensorRT-LLM sends ids in place of text (serve/openai_protocol.py, its pull request
# 5382), vLLM sends both. Neither knows the other's field; TensorRT-LLM refuses what it does not know, and all on chat.
WAYS = {"detokenize": {"detokenize": False}, "return_token_ids": {"return_token_ids": True}, "unasked": {}}
TEXT = "text"
ATTEMPTS, AGAIN_AFTER_S = 3, 1.0


def load_tokenizer(path):
    """Return (function text -> ids without special tokens, the end token's id or None, "") or (None, None, why not)."""
    if not path:
        return None, None, "client.tokenizer is not set"
    try:
        from tokenizers import Tokenizer  # in TensorRT-LLM's container

        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        return None, None, "client.tokenizer %s: %s: %s" % (path, type(error).__name__, error)
    try:
        word = json.loads(Path(path).with_name("tokenizer_config.json").read_text())["eos_token"]
        end_id = tokenizer.token_to_id(word["content"] if isinstance(word, dict) else word)
    except (OSError, ValueError, KeyError, TypeError):
        end_id = None

    def encode(text):
        # Two events may hold a half each of a surrogate pair; a half alone is no text.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return array.array("i", tokenizer.encode(text, add_special_tokens=False).ids)

    return encode, end_id, ""


def ids_of_text(read, encode, end_id):
    """Return the ids of a Read that has text only.

    Text holds no end token, though usage counts it: where the model ended the answer and usage counts one more than
    the text has, that is the end token.
    """
    ids = encode(read.text)
    if read.stopped and read.count == len(ids) + 1 and end_id is not None:
        ids.append(end_id)
    return ids


def ask(target, parts, timeout_s):
    """Send one prepared request over a connection of its own; return its answer's Read."""
    answer = Answer()
    with socket.create_connection((target.host, target.port), timeout_s) as plain:
        wire = target.ssl.wrap_socket(plain, server_hostname=target.host) if target.ssl else plain
        wire.sendall(target.head + b"".join(parts))
        while not answer.ended:
            data = wire.recv(1 << 16)
            if not data:
                break
            answer.feed(data)
    if not answer.ended and answer.framing != "eof":
        raise AnswerError("cut", "connection closed")
    return answer.result(want_ids=True)


def sends_ids(target, settings, fields):
    """Return whether answers to requests with these fields hold ids; AnswerError for a request that failed."""
    samples = Samples(settings, fields)
    samples.add(0, b",".join(b"%d" % i for i in PROBE_IDS), len(PROBE_IDS), PROBE_TOKENS, PROBE_TOKENS)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask(target, samples.parts[0], settings["request_timeout_s"]).ids is not None
        except BAD_ANSWER + (OSError,) as error:
            failure = AnswerError("refused", str(error)) if isinstance(error, OSError) else failure_of(error)
            if failure.kind == "http_4xx" or attempt == ATTEMPTS:
                raise failure from None
            time.sleep(AGAIN_AFTER_S)


def find_way(target, settings):
    """Return the way of WAYS in which the server sends ids, or TEXT, found out by asking for one short completion.

    Raises
    ------
    ClientError : it answers no completion, or sends text and there is no tokenizer.
    """
    where, is_chat = f"{target.host}:{target.port}", settings["endpoint"].endswith("/chat/completions")
    for way, fields in WAYS.items():
        if is_chat and fields:
            continue
        try:
            if sends_ids(target, settings, fields):
                return way
        except AnswerError as error:
            if not fields:
                said = f"{error.kind}: {target.mask(error.detail)[:300]}"
                raise ClientError(f"{where}: a completion before the run failed: {said}") from None
    encode, _, why = load_tokenizer(settings["tokenizer"])
    if encode is None:
        raise ClientError(
            f"{where}: this server sends text without ids, and {why}. Accuracy and TEST06 need ids: set model_dir to a "
            "folder with the model's tokenizer.json, or leave them out of test_modes"
        )
    return TEXT
