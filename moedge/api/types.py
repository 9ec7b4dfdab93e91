"""OpenAI's requests, as far as one text model can serve them. Knows no model: what depends on it is checked later.

What would change the answer and is not supported is refused by name; what changes nothing is accepted and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_INPUTS = 256


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}: send whole characters") from error
    return text


def _only(*neutral: Any) -> Any:
    """A field that is known, and refused unless it asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and not any(value == known and type(value) is type(known) for known in neutral):
            raise ValueError("not supported here: leave it out")
        return value

    return Annotated[Any, AfterValidator(check)]


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    """Types are exact and unknown names are refused, so that a misspelt setting is not a silent default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: one more chunk before [DONE] says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """What completions and chats share. `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

    model: Text
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    # Known, and only in the sense that changes nothing.
    frequency_penalty: _only(0, 0.0) = None  # type: ignore[valid-type]
    presence_penalty: _only(0, 0.0) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    # Known, and nothing that changes the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def settings(self) -> dict[str, Any]:
        """As `moedge.Sampling` takes them; temperature is 1 by default, as at OpenAI."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return given | {"temperature": 1.0 if self.temperature is None else self.temperature, "stop": stop}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingBody):
    """`prompt`: a text, its token ids, or a list of either."""

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: _only(1) = None  # type: ignore[valid-type]
    echo: _only(False) = None  # type: ignore[valid-type]
    suffix: _only("") = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[str | list[int]]:
        return as_list(self.prompt)


class TextPart(Body):
    """A piece of a message. Only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """What was said by whom."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Any = None
    refusal: _only() = None  # type: ignore[valid-type]
    tool_calls: _only([]) = None  # type: ignore[valid-type]
    function_call: _only() = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    annotations: _only([]) = None  # type: ignore[valid-type]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; they know the developer as the system."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(SamplingBody):
    """A conversation, to be continued by the assistant."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: Any = None
    functions: _only([]) = None  # type: ignore[valid-type]
    function_call: _only("none") = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    prediction: _only() = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]


class EmbeddingRequest(Body):
    """`input`: a text, its token ids, or a list of either."""

    model: Text
    input: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _only() = None  # type: ignore[valid-type]
    user: Any = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return as_list(self.input)


class TokenizeRequest(Body):
    """A text, or a conversation as the chat template puts it. One of the two."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


def as_list(value: Any) -> list[str | list[int]]:
    """One or many prompts as a list of prompts."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value
