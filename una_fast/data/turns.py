"""Where the prompt of a record ends and its responses begin.

    prompt, responses       given apart, or every response repeats the prompt as a whole chat
    responses as chats      the turns that all have in common are the prompt, up to an answer
    responses as dialogues  the same with "\\n\\nHuman: ...\\n\\nAssistant: ..." in one text

A response of a chat begins and ends with an assistant message. Between them others may stand: a
user's next question, the result of a tool.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from una_fast.data.messages import Message, RecordError, Text
from una_fast.printable import shown

_SPEAKERS = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

ASSISTANT = "assistant"


def split_texts(
    prompt: Text | None, responses: dict[str, Text], *, as_chat: bool
) -> tuple[Text | None, tuple[Text, ...]]:
    """Return the prompt and the responses, all as plain text, or all as chat messages.

    prompt: as in the row; None where the responses hold the prompt
    responses: name for messages -> response as in the row
    as_chat: plain text becomes a user's turn, or the turns of a dialogue

    The prompt is None where none is found. Raises RecordError by the name of the response.
    """
    texts = list(responses.values())
    plain = all(isinstance(text, str) for text in texts)
    if prompt is None and plain:
        prompt, texts = _split_dialogues(responses, as_chat=as_chat)
    if as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and plain or prompt is None and plain:
        return prompt, tuple(texts)
    answers = [_as_turn(text) for text in texts]
    chats = dict(zip(responses, answers, strict=True))
    for name, chat in chats.items():
        if chat[-1]["role"] != ASSISTANT:
            role = shown(chat[-1]["role"])
            raise RecordError(f"{name} must end with an assistant message, not with role {role}")
    if prompt is None or isinstance(prompt, str):
        prompt = _common_turns(chats, prompt)
    if not prompt or prompt[-1]["role"] == ASSISTANT:
        raise RecordError(
            "the prompt must end with a user (or tool) message, which the response then answers"
        )
    return prompt, tuple(_after(prompt, name, chat) for name, chat in chats.items())


def _as_turn(response: Text) -> list[Message]:
    if isinstance(response, str):
        return [{"role": ASSISTANT, "content": response}]
    return response


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
        if text is not None and all(turn.get("content") != text for turn in chat):
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


def _split_dialogues(
    responses: dict[str, Text], *, as_chat: bool
) -> tuple[Text | None, list[Text]]:
    """Return the prompt in common and the responses of dialogues in one text each.

    responses: name for messages -> text
    as_chat: return messages; else the texts as they are written

    The prompt is None if the texts are no dialogues.
    """
    texts = list(responses.values())
    dialogues = [_turns_of(text) for text in texts]
    if not texts or not all(dialogues):
        return None, texts
    if as_chat:
        chats = [[_as_message(*turn) for turn in dialogue] for dialogue in dialogues]
        named = dict(zip(responses, chats, strict=True))
        return _common_turns(named, None), chats
    *before, _ = dialogues[0]
    for name, dialogue in zip(responses, dialogues, strict=True):
        if dialogue[:-1] != before:
            raise RecordError(
                f"{name} differs in more than its last answer from {next(iter(responses))}, and as "
                "plain text all after the prompt would be trained on; set strings: chat"
            )
    prompt = "".join(f"\n\n{speaker}:{text}" for speaker, text in before)
    return f"{prompt}\n\nAssistant:", [dialogue[-1][1] for dialogue in dialogues]


def _turns_of(text: str) -> list[tuple[str, str]]:
    """Return the (speaker, text) turns of a dialogue from a Human to the Assistant; else []."""
    start, *pieces = _SPEAKERS.split(text)
    turns = list(zip(pieces[::2], pieces[1::2], strict=True))
    is_dialogue = turns and not start.strip() and turns[0][0] == "Human"
    return turns if is_dialogue and turns[-1][0] == "Assistant" else []


def _as_message(speaker: str, text: str) -> Message:
    if not text.strip():
        raise RecordError(f"a turn of the {speaker} is empty; fill it in or remove the record")
    return {"role": _ROLES[speaker], "content": text.strip()}
