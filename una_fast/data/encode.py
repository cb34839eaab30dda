"""Token ids of records: plain text or chat, with a single BOS and a single end of turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from una_fast.data.records import Message, Record, RecordError
from una_fast.data.settings import RecordOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Token ids of a record.

    prompt: [P] int32, P >= 1
    responses: [R_k] int32 for every response k, end of turn included
    truncated: the prompt was cut on the left
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    truncated: bool


class Encoder:
    """Records to token ids, under a given tokenizer.

    Plain text: the prompt begins with the tokenizer's own prefix of a text (BOS, if any); a
    response ends with EOS. Prompt and response are tokenised apart. A string prompt stays plain
    text even if the tokenizer has a chat template.

    Chat: the prompt is the template's rendering with the generation prompt; a response is the rest
    of the rendering with the answer, up to the end of turn. BOS is then the template's affair.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: RecordOptions) -> None:
        """Keep a tokenizer; ValueError without an EOS."""
        self.tokenizer = tokenizer
        self.options = options
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {_name(tokenizer)} has no eos_token, so no response can end; set "
                "eos_token in its tokenizer_config.json, or tokenizer.eos_token in Python"
            )
        self.eos = tokenizer.eos_token_id
        self.prefix = self._prefix()
        self._turn_end: tuple[str, str] | None = None  # asked for with the first chat

    def encode(self, record: Record, room: int = 0) -> Encoded:
        """Return the token ids of a record.

        record: a prompt, and any number of responses
        room: tokens that max_tokens must leave beside the prompt of a record without responses

        Raises RecordError for texts without tokens, over the limits, or refused by the template.
        """
        if isinstance(record.prompt, str):
            prompt, responses = self._plain_ids(record)
        else:
            prompt, responses = self._chat_ids(record)
        if not prompt:
            raise RecordError("prompt gives no tokens; fill it in or remove the record")
        longest = max((len(response) for response in responses), default=room)
        fitted = self._fit(prompt, longest)
        return Encoded(
            prompt=np.asarray(fitted, dtype=np.int32),
            responses=tuple(np.asarray(response, dtype=np.int32) for response in responses),
            truncated=len(fitted) < len(prompt),
        )

    def _plain_ids(self, record: Record) -> tuple[list[int], list[list[int]]]:
        prompt = self._ids(record.prompt)
        if prompt[: len(self.prefix)] != self.prefix:
            prompt = [*self.prefix, *prompt]
        responses = [self._ended(self._ids(response)) for response in record.responses]
        return prompt, responses

    def _chat_ids(self, record: Record) -> tuple[list[int], list[list[int]]]:
        text = render_chat(self.tokenizer, record.prompt, add_generation_prompt=True)
        prompt = self._ids(text)
        responses = []
        for response in record.responses:
            responses.append(self._answer_ids(record.prompt, text, prompt, response))
        return prompt, responses

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def _prefix(self) -> list[int]:
        """Return the tokenizer's own tokens before a text, such as [BOS].

        The tokenizer's tokens after a text (EOS, SEP) would end the prompt, and stay out.
        """
        bare = self._ids("a")
        full = list(self.tokenizer("a", return_attention_mask=False)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start]
        starts_with_bos = full[:1] == [self.tokenizer.bos_token_id]
        return full[:1] if starts_with_bos else []

    def _ended(self, ids: list[int]) -> list[int]:
        """Return ids with a single EOS at the end."""
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        if not ids:
            raise RecordError(
                "response is empty: it has no tokens but EOS; fill it in or remove the record"
            )
        return [*ids, self.eos]

    def _answer_ids(
        self,
        prompt: list[Message],
        prompt_text: str,
        prompt_ids: list[int],
        response: list[Message],
    ) -> list[int]:
        whole = render_chat(self.tokenizer, [*prompt, *response])
        if not whole.startswith(prompt_text):
            raise RecordError(
                f"the chat template of {_name(self.tokenizer)} renders prompt + response "
                "differently from the prompt with its generation prompt, which must be its "
                "beginning; fix the template's add_generation_prompt part"
            )
        if self._turn_end is None:
            self._turn_end = text_after_answer(self.tokenizer, prompt)
        end, space = self._turn_end
        whole = whole.removesuffix(space)
        if not whole.endswith(end):
            raise RecordError(
                f"the chat template of {_name(self.tokenizer)} does not end this response "
                f"with {end!r}"
            )
        while end and whole.endswith(end + end):  # the text brought its own end of turn
            whole = whole.removesuffix(end)
        # Tokenised with the prompt before it, where the boundary allows: some tokenizers put a
        # space before any text.
        ids = self._ids(whole)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._ids(whole[len(prompt_text) :])
        return ids if end else self._ended(ids)

    def _fit(self, prompt: list[int], response: int) -> list[int]:
        """Return the prompt within max_prompt_tokens, and within max_tokens with a response.

        response: tokens of the longest response
        """
        options = self.options
        room = len(prompt)
        if options.max_tokens is not None:
            room = options.max_tokens - response
        limit = min(room, options.max_prompt_tokens or room)
        if len(prompt) <= limit:
            return prompt

        kept = self._kept_at_the_start(prompt)
        if room <= kept:
            raise RecordError(
                f"a response of {response} tokens leaves no room for its prompt within "
                f"max_tokens={options.max_tokens}; raise max_tokens or remove the record "
                "(responses are never cut)"
            )
        if options.prompt_overflow == "error":
            name = "max_tokens" if limit == room else "max_prompt_tokens"
            raise RecordError(
                f"prompt has {len(prompt)} tokens (longest response: {response}), over "
                f"{name}={getattr(options, name)}; raise {name}, shorten the prompt, "
                "or set prompt_overflow: truncate_left"
            )
        return [*prompt[:kept], *prompt[len(prompt) - limit + kept :]]

    def _kept_at_the_start(self, prompt: list[int]) -> int:
        """Return how many tokens a cut leaves at the start of a prompt: the prefix, or BOS."""
        if prompt[: len(self.prefix)] == self.prefix:
            return len(self.prefix)
        return int(prompt[0] == self.tokenizer.bos_token_id)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return messages as the text of the tokenizer's chat template.

    Raises ValueError without a template, RecordError where the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the record is a chat, but tokenizer {_name(tokenizer)} has no chat template; set "
            "chat_template in its tokenizer_config.json, or give prompts and responses as plain "
            "strings"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        # Templates raise their own refusals, and any error of the expressions in them.
        raise RecordError(
            f"the chat template of {_name(tokenizer)} refuses the messages: {error}"
        ) from None


def text_after_answer(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> tuple[str, str]:
    """Return the text after an answer in the chat template: (end of turn, white space), such as
    ("<|im_end|>", "\\n"). The end of turn may be "".

    Errors as in `render_chat`.
    """
    answer = "una-answer"
    text = render_chat(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    tail = text.rpartition(answer)[2]
    end = tail.rstrip()
    return end, tail[len(end) :]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
