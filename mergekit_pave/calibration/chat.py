"""Chat rows: the two common layouts in, one list of `{role, content}` out; chat templates."""

from __future__ import annotations

from typing import Any

from mergekit_pave.calibration.rows import SkipRow

# Replaces transformers' function of this name: rows must not depend on the day they are read.
_DATE = "{%- macro strftime_now(format) -%}1 January 2025{%- endmacro -%}"

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
    "ipython": "ipython",
}


def written(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The chat as the model's own template writes it, on whatever day."""
    template = _DATE + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=template, **options)


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`[{role, content}]` from that form or from ShareGPT's `[{from, value}]`.

    Other keys (tool calls, names, reasoning) stay for the template to use, unless null:
    Arrow fills the keys that other messages have.

    Raises:
        SkipRow: a message has no text, or a role that is not known.
    """
    return [_message(message) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role") or message.get("from")
    content = message["content"] if "content" in message else message.get("value")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "\n".join(part["text"] for part in content)
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if role not in _ROLES:
        raise SkipRow("a message with an unknown role", repr(role))
    if not isinstance(content, str):
        raise SkipRow("a message whose content is not text", shape(content))
    extras = {
        key: value for key, value in message.items()
        if value is not None and key not in ("role", "content", "from", "value")}
    return {"role": _ROLES[role], "content": content, **extras}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(
        part.get("text"), str)


def shape(value: Any, depth: int = 3) -> str:
    """Keys and types of a value, and never its text: `[{'role': str, ...}, ... 4 in all]`."""
    if isinstance(value, dict) and depth:
        return "{" + ", ".join(f"{k!r}: {shape(v, depth - 1)}" for k, v in value.items()) + "}"
    if isinstance(value, list) and value and depth:
        rest = f", ... {len(value)} in all" if len(value) > 1 else ""
        return f"[{shape(value[0], depth - 1)}{rest}]"
    return type(value).__name__
