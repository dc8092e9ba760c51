"""What TensorRT-LLM's own models take and give, written down as strict models: a field that is not there is refused.

Of both releases, as far as a disaggregated run needs it: requests to an orchestrator and from it to its servers, and
what servers answer. Source: tensorrt_llm/serve/openai_protocol.py, postprocess_handlers.py and the orchestrators
(facts: `trtllm-real.md`); names, types and what must be there are theirs, nothing else is.
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ids = list[int]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)


class StreamOptions(Strict):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = None


class Params51(Strict):
    request_type: Literal["context_only", "generation_only"]
    first_gen_tokens: Ids | None = None
    ctx_request_id: int | None = None
    encoded_opaque_state: str | None = None
    draft_tokens: Ids | None = None


class Params12(Params51):
    disagg_request_id: int
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: str | None = None


class Request(Strict):
    model: str
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def options_need_a_stream(self):
        assert self.stream or not self.stream_options
        return self


class Completion(Request):
    prompt: Ids
    max_tokens: int | None = None
    detokenize: bool = True


class Chat(Request):
    messages: list[dict]
    prompt_token_ids: Ids | None = None
    max_completion_tokens: int | None = Field(None, validation_alias="max_tokens")


class Usage(Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(Strict):
    index: Literal[0]
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class TextChoice(Choice):
    text: str
    token_ids: Ids | None = None


class Delta(Strict):
    role: Literal["assistant"] | None = None
    content: str | None = None


class DeltaChoice(Choice):
    delta: Delta


class MessageChoice(Choice):
    message: Delta


class Head(Strict):
    id: str
    created: int
    model: str


class CompletionChunk(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[DeltaChoice] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


class UsageChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list = Field(max_length=0)
    usage: Usage


class CompletionAnswer(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice] = Field(min_length=1, max_length=1)
    usage: Usage
    prompt_token_ids: Ids | None = None


class ChatAnswer(Head):
    object: Literal["chat.completion"]
    choices: list[MessageChoice] = Field(min_length=1, max_length=1)
    usage: Usage
    prompt_token_ids: Ids | None = None


def with_params(model, params, **more):
    """The model with disaggregated_params of a release, in it or in its choices."""
    return type(model.__name__, (model,), {"__annotations__": {"disaggregated_params": params, **more}})


def check_request(dialect: str, path: str, body: dict, by_orchestrator: bool) -> Request:
    """Validate a request as the release that gets it does."""
    model = Chat if "chat" in path else Completion
    if by_orchestrator:
        model = with_params(model, Params51 if dialect == "v5.1" else Params12)
    request = model.model_validate(body)
    if by_orchestrator and request.disaggregated_params.request_type == "generation_only":
        assert request.disaggregated_params.ctx_request_id is not None
        assert request.disaggregated_params.first_gen_tokens
    return request


def check_stream(path: str, content: bytes, asked: Request, dialect: str) -> list:
    """Validate a stream's events and where usage and ids stand; return its chunks without the last usage."""
    *events, done, rest = content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"") and all(event.startswith(b"data: {") for event in events)
    parsed = [json.loads(event[6:]) for event in events]
    options = asked.stream_options
    if options and options.include_usage:
        UsageChunk.model_validate(parsed.pop())
    chunks = [(ChatChunk if "chat" in path else CompletionChunk).model_validate(event) for event in parsed]
    everywhere = options and options.continuous_usage_stats
    everywhere = bool(options) and (dialect == "v5.1" if everywhere is None else everywhere)
    tokens = chunks[1:] if "chat" in path else chunks
    assert all((chunk.usage is not None) == everywhere for chunk in tokens)
    assert [c.choices[0].finish_reason is not None for c in tokens] == [False] * (len(tokens) - 1) + [True]
    if "chat" not in path:
        assert all((c.choices[0].token_ids is None) == asked.detokenize for c in chunks)
        assert asked.detokenize or all(c.choices[0].text == "" for c in chunks)
    return chunks


def check_answer(path: str, content: bytes, asked: Request, dialect: str):
    """Validate a context server's answer: with what joins the phases, and the id that it was given."""
    params = Params51 if dialect == "v5.1" else Params12
    kind, choice = (ChatAnswer, MessageChoice) if "chat" in path else (CompletionAnswer, TextChoice)
    model = type("Whole", (kind,), {"__annotations__": {"choices": list[with_params(choice, params)]}})
    answer = model.model_validate_json(content)
    given = answer.choices[0].disaggregated_params
    assert given.ctx_request_id is not None and answer.prompt_token_ids
    if dialect != "v5.1":
        assert given.disagg_request_id == asked.disaggregated_params.disagg_request_id
    return answer
