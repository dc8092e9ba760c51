"""A server whose answers are written in the test: what real servers of several makes say to a completion request."""

from endpoint import Server, chunk, event

END_ID = 128009


class Scripted(Server):
    """Answers each request with what script(body) gives: a list of messages, a status, or bytes to close after."""

    def __init__(self, script):
        super().__init__()
        self.script = script

    async def _answer(self, writer, head, body, what):
        said = self.script(body)
        if isinstance(said, int):
            writer.write(b'HTTP/1.1 %d Told\r\nContent-Length: 16\r\n\r\n{"error": "told"}'[:-1] % said)
        elif isinstance(said, bytes):
            writer.write(said)
            return False
        else:
            writer.write(self.HEAD + b"".join(chunk(event(message)) for message in said) + b"0\r\n\r\n")
        return True


def answer(body, ids, texts, finish="stop", **said):
    """The messages of a completion: a token each, then usage and [DONE]; ids or texts may be Nones."""
    last = len(ids) - 1
    choices = (
        {"index": 0, "text": t or "", "token_ids": i and [i], "finish_reason": finish if n == last else None}
        for n, (i, t) in enumerate(zip(ids, texts, strict=True))
    )
    prompt = body.get("prompt") or body["prompt_token_ids"]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), **said}
    return [*({"choices": [choice]} for choice in choices), {"choices": [], "usage": usage}, b"[DONE]"]


def tensorrt(body):
    """TensorRT-LLM: ids in place of text if told not to detokenize; unknown fields are refused; the end has no text."""
    if "return_token_ids" in body:
        return 400
    ids, texts = [1007, END_ID], ["t7", ""]
    return (
        answer(body, ids, [None] * 2) if body.get("detokenize") is False else answer(body, [None] * 2, texts)
    )


def vllm(body):
    """vLLM: fields that it does not know are no matter; ids beside the text if asked for."""
    ids = [1007, END_ID] if body.get("return_token_ids") else [None] * 2
    return answer(body, ids, ["t7", ""])


def text_only(body):
    """A release before both fields."""
    return 400 if {"detokenize", "return_token_ids"} & set(body) else answer(body, [None] * 2, ["t7", ""])
