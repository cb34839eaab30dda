"""Chat messages as people write them, in one form: {"role": ..., "content": "text", ...}.

{"from": "human", "value": "Hi"}                                ShareGPT
{"role": "user", "content": [{"type": "text", "text": "Hi"}]}   parts of text
{"role": "assistant", "tool_calls": [{"function": {...}}]}      a call of tools, without a text
"""

from __future__ import annotations

from typing import Any

from una_fast.data.strict_json import parse_strictly
from una_fast.printable import shown

Message = dict[str, Any]

Text = str | list[Message]
"""Plain text, or chat messages."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Roles of ShareGPT under the names of chat templates; other roles keep their names."""


class RecordError(ValueError):
    """Refusal of a row; the message names the field and the mend, the reader adds the place."""


def text_or_messages(name: str, value: object) -> Text:
    """Return a text, or a list of messages; RecordError by name for anything else.

    name: of the field, for messages
    value: a text, a message, or a list of messages
    """
    if isinstance(value, str):
        if not value.strip():
            raise RecordError(f"{name} is empty; fill it in or remove the record")
        return value
    if isinstance(value, dict):
        return [_message(name, value)]
    if not isinstance(value, list):
        raise RecordError(
            f"{name} is {shown(value)} ({type(value).__name__}); "
            "write a string or a list of chat messages"
        )
    if not value:
        raise RecordError(f"{name} is empty; fill it in or remove the record")
    return [_message(f"{name}[{k}]", message) for k, message in enumerate(value)]


def objects(name: str, value: object) -> list[dict[str, Any]]:
    """Return a list of objects, such as tools; RecordError by name for anything else.

    name: of the field, for messages
    value: a list of objects, or the list as JSON text
    """
    value = _from_json(name, value)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise RecordError(f"{name} is {shown(value)}; write a list of objects, or as JSON text")
    return value


def mapping(name: str, value: object) -> dict[str, Any]:
    """Return an object, such as chat_template_kwargs; RecordError by name for anything else.

    name: of the field, for messages
    value: an object, or the object as JSON text
    """
    value = _from_json(name, value)
    if not isinstance(value, dict):
        raise RecordError(f"{name} is {shown(value)}; write an object, or an object as JSON text")
    return {key: entry for key, entry in value.items() if entry is not None}


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of null value in its objects.

    Arrow gives every object the keys of all objects in a column; templates ask which are there.
    """
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _from_json(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_strictly(value)
    except ValueError as error:
        raise RecordError(f"{name}: {error}") from None


def _message(name: str, value: object) -> Message:
    """Return a message without the keys of null value; unknown keys stay, for the template."""
    if not isinstance(value, dict):
        raise RecordError(f'{name} is {shown(value)}; a message is {{"role": ..., "content": ...}}')
    if value.get("from") is not None and value.get("role") is None:
        value = _from_sharegpt(name, value)
    role = value.get("role")
    if not isinstance(role, str) or not role.strip():
        raise RecordError(
            f"{name}.role is {shown(role)} ({type(role).__name__}); write user, assistant, system, "
            "tool or another role of the chat template"
        )
    calls_tools = _calls_tools(name, value.get("tool_calls")) and role == "assistant"
    content = value.get("content")
    if isinstance(content, list):
        content = _joined(f"{name}.content", content)
        value = {**value, "content": content}
    if isinstance(content, str):
        # An empty answer calls tools; an empty system text or result of a tool says something.
        if not content.strip() and role in ("user", "assistant") and not calls_tools:
            raise RecordError(f"{name}.content is empty; fill it in or remove the record")
    elif content is not None or not calls_tools:
        raise RecordError(
            f"{name}.content is {shown(content)} ({type(content).__name__}); write a string"
        )
    return {key: entry for key, entry in value.items() if entry is not None}


def _from_sharegpt(name: str, value: dict[str, Any]) -> Message:
    """Return a message of ShareGPT under our keys; a function_call becomes a call of tools."""
    speaker = value["from"]
    if not isinstance(speaker, str):
        raise RecordError(f"{name}.from is {shown(speaker)}; write human, gpt, system or tool")
    others = {key: entry for key, entry in value.items() if key not in ("from", "value")}
    message = {**others, "role": ROLES.get(speaker, speaker), "content": value.get("value")}
    if speaker != "function_call":
        return message
    calls = _from_json(f"{name}.value", value.get("value"))
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise RecordError(
            f'{name}.value is {shown(calls)}; a function_call is {{"name": ..., "arguments": ...}}'
        )
    message["content"] = ""
    message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _joined(name: str, parts: list[Any]) -> str:
    """Return the text of parts; RecordError for a part of another type, by the type."""
    texts = []
    for k, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise RecordError(
                f"{name}[{k}] is a part of type {shown(kind)}; a part is "
                '{"type": "text", "text": ...} (images and other media are not trained on)'
            )
        texts.append(text)
    return "".join(texts)


def _calls_tools(name: str, calls: object) -> bool:
    """Return whether a message has tool calls; RecordError for anything but a list of objects."""
    if calls is None:
        return False
    if not isinstance(calls, list):
        raise RecordError(
            f"{name}.tool_calls is {shown(calls)} ({type(calls).__name__}); write a list of calls"
        )
    for k, call in enumerate(calls):
        if not isinstance(call, dict):
            raise RecordError(
                f"{name}.tool_calls[{k}] is {shown(call)}; a call is an object, such as "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
            )
    return bool(calls)
