"""Where the prompt of a record ends and its responses begin.

    prompt, responses       given apart, or every response repeats the prompt as a whole chat
    responses as chats      the turns that all have in common are the prompt, up to an answer
    responses as dialogues  the same with "\\n\\nHuman: ...\\n\\nAssistant: ..." in one text

A response of a chat begins and ends with an assistant message. Between them others may stand: a
user's next question, the result of a tool.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection

from una_fast.data.messages import Message, RecordError, Text
from una_fast.printable import shown

_SPEAKERS = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

ASSISTANT = "assistant"

_Turn = tuple[str, str]  # speaker and text of a turn of a dialogue


def split_texts(
    prompt: Text | None, responses: dict[str, Text], *, as_chat: bool
) -> tuple[Text | None, tuple[Text, ...]]:
    """Return the prompt and the responses, all as plain text, or all as chat messages.

    prompt: as in the row; None where the responses hold the prompt
    responses: name for messages -> response as in the row
    as_chat: plain text becomes a user's turn, or the turns of a dialogue

    The prompt is None where none is found. Raises RecordError by the name of the response.
    """
    plain = all(isinstance(text, str) for text in responses.values())
    if prompt is None and plain:
        dialogues = {name: _turns_of(text) for name, text in responses.items()}
        if not responses or not all(dialogues.values()):
            return None, ()
        if not as_chat:
            return _split_dialogues(dialogues)
        responses = {name: _as_messages(dialogue) for name, dialogue in dialogues.items()}
    elif isinstance(prompt, str) and plain and not as_chat:
        return prompt, tuple(responses.values())
    chats = {name: _as_turn(text, as_chat=as_chat) for name, text in responses.items()}
    if as_chat and isinstance(prompt, str):
        prompt = _dialogue_so_far(prompt) or prompt
    if isinstance(prompt, str):
        is_repeated = any(map(functools.partial(_has_turn, prompt), chats.values()))
        if as_chat and not is_repeated:
            prompt = [{"role": "user", "content": prompt}]
    return _split_chats(prompt, chats)


def _has_turn(text: str, chat: list[Message]) -> bool:
    return any(turn.get("content") == text for turn in chat)


def _split_chats(
    prompt: Text | None, chats: dict[str, list[Message]]
) -> tuple[list[Message], tuple[list[Message], ...]]:
    """Return the prompt of chats, and their turns after the prompt.

    prompt: as in the row
    chats: name for messages -> response, perhaps as a whole chat
    """
    for name, chat in chats.items():
        if chat[-1]["role"] != ASSISTANT:
            role = shown(chat[-1]["role"])
            raise RecordError(f"{name} must end with an assistant message, not with role {role}")
    if not isinstance(prompt, list):
        prompt = _common_turns(chats, prompt)
    if not prompt or prompt[-1]["role"] == ASSISTANT:
        raise RecordError(
            "the prompt must end with a user (or tool) message, which the response then answers"
        )
    return prompt, tuple(_after(prompt, name, chat) for name, chat in chats.items())


def _as_turn(response: Text, *, as_chat: bool) -> list[Message]:
    """Return a response as messages. as_chat: a dialogue becomes the turns of the dialogue"""
    if not isinstance(response, str):
        return response
    dialogue = _turns_of(response) if as_chat else []
    return _as_messages(dialogue) or [{"role": ASSISTANT, "content": response}]


def _after(prompt: list[Message], name: str, chat: list[Message]) -> list[Message]:
    """Return the turns of a response after the prompt, which the response may repeat."""
    turns = chat[len(prompt) :] if chat[: len(prompt)] == prompt else chat
    if turns[0]["role"] != ASSISTANT:
        raise RecordError(
            f"{name} does not continue the prompt: its first turns must be those of the prompt, or "
            "an assistant message (without a prompt column: turns that all responses share)"
        )
    return turns


def _common_turns(chats: dict[str, list[Message]], text: str | None) -> list[Message]:
    """Return the prompt of whole chats: turns in common, before an answer of each.

    chats: name for messages -> chat
    text: text of the prompt column, if any: some datasets give the text of one user turn beside
        responses that are whole chats

    A single chat is answered by its last turn alone.
    """
    for name, chat in chats.items():
        if text is not None and not _has_turn(text, chat):
            raise RecordError(
                f"prompt is plain text but {name} is a list of messages; write the prompt as "
                'messages too, [{"role": "user", "content": ...}]'
            )
    first, *others = chats.values()
    shared = len(first) - 1
    for chat in others:
        same = 0
        while same < min(shared, len(chat) - 1) and chat[same] == first[same]:
            same += 1
        shared = same
    while shared and not _are_answered(chats.values(), shared):
        shared -= 1
    return first[:shared] or _none_in_common(list(chats))


def _are_answered(chats: Collection[list[Message]], turns: int) -> bool:
    """Return whether every chat has an assistant message after its first turns."""
    before = next(iter(chats))[turns - 1]["role"]
    return before != ASSISTANT and all(chat[turns]["role"] == ASSISTANT for chat in chats)


def _none_in_common(names: list[str]) -> list[Message]:
    if len(names) == 1:
        return []
    raise RecordError(
        f"{names[-1]} does not continue the prompt of {names[0]}: without a prompt column all "
        "responses must begin with the same turns, up to a user's; add a prompt column"
    )


# ---- dialogues ---------------------------------------------------------------------------------


def _split_dialogues(dialogues: dict[str, list[_Turn]]) -> tuple[str, tuple[str, ...]]:
    """Return the prompt in common and the last answers, as they are written.

    dialogues: name for messages -> turns
    """
    first, *_ = dialogues
    *before, _ = dialogues[first]
    for name, dialogue in dialogues.items():
        if dialogue[:-1] != before:
            raise RecordError(
                f"{name} differs in more than its last answer from {first}, and as plain text all "
                "after the prompt would be trained on; set strings: chat"
            )
    prompt = "".join(f"\n\n{speaker}:{text}" for speaker, text in before)
    answers = tuple(dialogue[-1][1] for dialogue in dialogues.values())
    return f"{prompt}\n\nAssistant:", answers


def _turns_of(text: str) -> list[_Turn]:
    """Return the turns of a dialogue from a Human to the Assistant; [] for any other text."""
    start, *pieces = _SPEAKERS.split(text)
    turns = list(zip(pieces[::2], pieces[1::2], strict=True))
    speakers = pieces[::2]
    is_dialogue = not start.strip() and speakers[:1] == ["Human"] and speakers[-1] == "Assistant"
    return turns if is_dialogue else []


def _dialogue_so_far(prompt: str) -> list[Message]:
    """Return the turns of a dialogue up to the Human's last; [] for any other text."""
    turns = _turns_of(prompt) or _turns_of(f"{prompt}\n\nAssistant:")
    if not turns or turns[-1][1].strip():
        return []
    return _as_messages(turns[:-1])


def _as_messages(dialogue: list[_Turn]) -> list[Message]:
    messages = []
    for speaker, text in dialogue:
        if not text.strip():
            raise RecordError(f"a turn of the {speaker} is empty; fill it in or remove the record")
        messages.append({"role": _ROLES[speaker], "content": text.strip()})
    return messages
