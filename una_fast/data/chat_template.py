"""Chats as the text of a tokenizer's chat template, which is foreign code under bounds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from una_fast.data.bounded import fault_of_trial, interrupted_after
from una_fast.data.messages import Message, RecordError
from una_fast.printable import printable, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a chat. A record of a megabyte takes a hundredth of a second.
SECONDS = 1
MEMORY = 1 << 30
LONGEST_CHAT = 1 << 26  # characters

# A tag that a generation prompt opens for the model, such as "<think>\n".
_OPENED = re.compile(r"<\w+>\s*\Z")

_tried: set[str] = set()  # templates that have shown in a child that they end


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """Return messages as the text of the tokenizer's chat template.

    tokenizer: has the template
    messages: the chat
    add_generation_prompt: end with the header of the assistant's next turn
    variables: of the template, beside the messages: tools, enable_thinking and the like

    Raises RecordError where the template refuses the messages; ValueError without a template, and
    for a template that takes more than SECONDS, MEMORY or LONGEST_CHAT.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the record is a chat, but tokenizer {name_of(tokenizer)} has no chat template; set "
            "chat_template in its tokenizer_config.json, or give prompts and responses as plain "
            "strings"
        )

    def render(chat: list[Message], header: bool) -> str:
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=header, **(variables or {})
        )

    try:
        template = tokenizer.get_chat_template()
        if template not in _tried:
            _try_in_child(name_of(tokenizer), render, messages)
            _tried.add(template)
        text = interrupted_after(SECONDS, lambda: render(messages, add_generation_prompt))
    except _EndlessError:
        raise
    except (TimeoutError, MemoryError) as error:
        raise _endless(name_of(tokenizer), str(error) or "more memory than there is") from None
    except Exception as error:
        # Templates raise their own refusals, and any error of the expressions in them.
        raise RecordError(
            f"the chat template of {name_of(tokenizer)} refuses the messages: "
            f"{type(error).__name__}: {printable(error)}"
        ) from None
    if len(text) > LONGEST_CHAT:
        raise _endless(name_of(tokenizer), f"{len(text)} characters")
    return text


class _EndlessError(ValueError):
    """Refusal of a template that does not end."""


def _endless(name: str, amount: str) -> _EndlessError:
    return _EndlessError(
        f"the chat template of {name} takes {amount} for one chat; use the template of the model's "
        "publisher (chat_template.jinja)"
    )


def _try_in_child(
    name: str, render: Callable[[list[Message], bool], str], messages: list[Message]
) -> None:
    """Render a chat, and a longer one, in a child first; _EndlessError if that does not end.

    name: of the tokenizer
    render: from messages, with or without the header of the next turn, to text
    messages: the chat
    """
    turns = [{"role": "user", "content": "a " * 500}, {"role": "assistant", "content": "b " * 500}]
    longer = [*turns * 10, turns[0]]

    def trial() -> None:
        for chat, header in itertools.product((messages, longer), (True, False)):
            try:
                render(chat, header)
            except MemoryError:
                raise
            except Exception:  # a refusal: a template may want other roles
                continue

    fault = fault_of_trial(trial, seconds=SECONDS, memory=MEMORY)
    if fault is not None:
        raise _endless(name, fault)


def text_after_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    variables: dict[str, Any] | None = None,
) -> tuple[str, str]:
    """Return the text after an answer in the chat template: (end of turn, white space), such as
    ("<|im_end|>", "\\n"). The end of turn may be "".

    Parameters and errors as in `render_chat`.
    """
    answer = "una-answer"
    chat = [*prompt, {"role": "assistant", "content": answer}]
    text = render_chat(tokenizer, chat, variables=variables)
    tail = text.rpartition(answer)[2]
    end = tail.rstrip()
    return end, tail[len(end) :]


# ---- responses ---------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a rendered response: an answer, or what stands between two answers.

    has_end: the answer ends with the template's end of turn
    """

    text: str
    is_answer: bool
    has_end: bool = True


class Chat:
    """Renderings of a record's chat, each of which must be the beginning of the next."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: dict[str, Any],
        end: tuple[str, str],
    ) -> None:
        """Keep the ways of a template.

        tokenizer: has the template
        variables: of the template, beside the messages
        end: text after every answer, as `text_after_answer` returns it
        """
        self.tokenizer = tokenizer
        self.variables = variables
        self.end, self.space = end

    def asked(self, messages: list[Message]) -> str:
        """Return the rendering up to the header of the next answer."""
        return render_chat(
            self.tokenizer, messages, add_generation_prompt=True, variables=self.variables
        )

    def pieces(self, prompt: list[Message], text: str, response: list[Message]) -> list[Piece]:
        """Return the parts of a response.

        prompt: messages before the response
        text: rendering of the prompt
        response: messages, the first and the last of the assistant

        Raises RecordError where the template renders earlier turns anew.
        """
        pieces = []
        for number, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            before = [*prompt, *response[:number]]
            if pieces:
                asked = self.asked(before)
                self._check_beginning(text, asked)
                pieces.append(Piece(asked[len(text) :], is_answer=False))
                text = asked
            whole = render_chat(self.tokenizer, [*before, message], variables=self.variables)
            self._check_beginning(text, whole)
            whole = self._without_excess(whole)
            pieces.append(Piece(whole[len(text) :], is_answer=True, has_end=bool(self.end)))
            text = whole
        return pieces

    def _without_excess(self, whole: str) -> str:
        """Return the rendering of an answered chat up to the end of turn, which stands once."""
        whole = whole.removesuffix(self.space)
        if not whole.endswith(self.end):
            raise RecordError(
                f"the chat template of {name_of(self.tokenizer)} does not end this response "
                f"with {shown(self.end)}"
            )
        while self.end and whole.endswith(self.end * 2):  # the text brought its own end of turn
            whole = whole.removesuffix(self.end)
        return whole

    def _check_beginning(self, text: str, whole: str) -> None:
        """Check that a rendering begins with the rendering of fewer messages; RecordError."""
        if whole.startswith(text):
            return
        opened = _OPENED.search(text)
        if opened and whole.startswith(text[: opened.start()]):
            tag = opened.group().rstrip()
            raise RecordError(
                f"the generation prompt of the chat template of {name_of(self.tokenizer)} ends "
                f"in an opened {tag}, which this answer lacks once rendered; take {tag} out of "
                "the template's add_generation_prompt part (and let the template keep it in "
                "answers that bring it), or give prompts and responses as plain strings"
            )
        raise RecordError(
            f"the chat template of {name_of(self.tokenizer)} renders prompt + response "
            "differently from the prompt with its generation prompt, which must be its "
            "beginning; fix the template's add_generation_prompt part"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the path or the class of a tokenizer, for messages."""
    return printable(tokenizer.name_or_path or type(tokenizer).__name__)
