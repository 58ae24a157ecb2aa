"""What `generate` and its batch form share: whether a prompt is a chat, and a completion as JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.engine import Completion


def chat_wanted(arguments: "jsonargparse.Namespace") -> bool:
    """Whether --prompt is a message: where a flag says so, or only makes sense in a chat; --raw overrides."""
    implied = (
        arguments.think
        or arguments.no_think
        or arguments.system is not None
        or arguments.thinking_budget is not None
    )
    return not arguments.raw and (arguments.chat or implied)


def thinking_wanted(arguments: "jsonargparse.Namespace") -> bool | None:
    """On, off, or None: as the messages' /think and /no_think say."""
    if arguments.no_think:
        return False
    return True if arguments.think or arguments.thinking_budget is not None else None


def as_json(completion: "Completion") -> dict[str, Any]:
    """A completion as every --json of generation shows it, the trace apart from the answer too."""
    from nanohybrid.text import split_thinking

    reasoning, content = split_thinking(completion.text, opened=completion.thinking_tokens > 0)
    return {
        "text": completion.text, "reasoning": reasoning, "content": content,
        "tokens": len(completion.token_ids),
        "token_ids": completion.token_ids, "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "thinking_tokens": completion.thinking_tokens, "thinking_end": completion.thinking_end,
        "error": None if completion.error is None else completion.error.message,
    }  # fmt: skip
