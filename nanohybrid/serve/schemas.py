"""The bodies of requests. Ranges of values are here; sizes, which the server sets, are in limits.py.

A field that is not named here is refused. Those of `Ignored` are OpenAI's; they are accepted and have no
effect.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Loose(BaseModel):
    """Objects that clients send back as they got them: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class StreamOptions(Loose):
    include_usage: bool = False


class StructuredOutputs(Request):
    """vLLM's field: one of a regular expression, a JSON schema and a list of choices."""

    regex: str | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.regex, self.json_, self.choice)) != 1:
            raise ValueError("give one of regex, json and choice")
        return self


class Ignored(Request):
    """Fields that are accepted and have no effect."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Decoding(Ignored):
    """Decoding parameters, the same for all routes that generate."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: Seed | None = None
    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    thinking_budget: Count | None = None
    max_thinking_tokens: Count | None = None
    thinking_grace: Count | None = None
    cache_salt: str | None = Field(None, max_length=256)
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None

    @property
    def budget(self) -> int | None:
        return self.thinking_budget if self.thinking_budget is not None else self.max_thinking_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Loose):
    type: Literal["text"] = "text"
    text: str


class CalledFunction(Loose):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Loose):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Loose):
    """A message. Whether the reasoning of earlier turns is shown to the model again, its template says."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        empty = self.role == "assistant" and (self.tool_calls or self.reasoning_content)
        if self.content is None and not empty:
            raise ValueError(f"a message of role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as the chat template takes it."""
        return self.model_dump(exclude_none=True) | {
            "content": (self.content and self.model_dump()["content"]) or ""
        }


class Function(Loose):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.\-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Loose):
    name: str


class NamedTool(Loose):
    type: Literal["function"] = "function"
    function: FunctionName


class JsonSchema(Loose):
    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class TemplateArguments(Request):
    """The only arguments of the template that a request may set."""

    enable_thinking: bool | None = None


class ChatRequest(Decoding):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @property
    def max_answer_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Decoding):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(Ignored):
    """A text (`prompt`, or llama.cpp's `content`), or a conversation as the model sees it."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self


class DetokenizeRequest(Ignored):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
