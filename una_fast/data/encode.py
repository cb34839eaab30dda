"""Token ids of records: plain text and chats, prompt and response apart, one BOS and one end of turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from una_fast.data.records import Message, Record, RecordError, RecordOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Token ids of records under one tokenizer.

    Plain text: what the tokenizer puts before a text (BOS, if it uses one) + prompt, and response + EOS, tokenised
    apart. A string prompt stays plain text even if the tokenizer has a chat template. Chat: the template's rendering
    of the prompt with its generation prompt, and the rest of the rendering with the answer, up to the end of turn;
    BOS is then the template's affair.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: RecordOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {self.name} has no eos_token, so no response can end; set eos_token in its "
                "tokenizer_config.json, or tokenizer.eos_token in Python"
            )
        self.eos = tokenizer.eos_token_id
        self.prefix = self._prefix()
        self.turn_end: tuple[str, str] | None = None

    def encode(
        self, record: Record, room: int = 0
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...], bool]:
        """(prompt ids, ids of every response, whether the prompt was truncated), int32. room: tokens that max_tokens
        must leave beside the prompt at least."""
        if isinstance(record.prompt, str):
            prompt = self._ids(record.prompt)
            prompt = (
                prompt if prompt[: len(self.prefix)] == self.prefix else [*self.prefix, *prompt]
            )
            responses = [self._ended(self._ids(response)) for response in record.responses]
        else:
            text = self._render(record.prompt, add_generation_prompt=True)
            prompt = self._ids(text)
            responses = [
                self._answer(record.prompt, text, prompt, response) for response in record.responses
            ]
        if not prompt:
            raise RecordError("prompt gives no tokens; fill it in or remove the record")
        fitted = self._fit(prompt, max(map(len, responses), default=room))
        as_array = [np.asarray(ids, dtype=np.int32) for ids in (fitted, *responses)]
        return as_array[0], tuple(as_array[1:]), len(fitted) < len(prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text. What it puts after one (EOS, SEP) would end the prompt."""
        bare, full = (
            self._ids("a"),
            list(self.tokenizer("a", return_attention_mask=False)["input_ids"]),
        )
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start]
        return full[:1] if full[:1] == [self.tokenizer.bos_token_id] else []

    def _ended(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        if not ids:
            raise RecordError(
                "response is empty: it has no tokens but EOS; fill it in or remove the record"
            )
        return [*ids, self.eos]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the record is a chat, but tokenizer {self.name} has no chat template; set chat_template in its "
                "tokenizer_config.json, or give prompts and responses as plain strings"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (
            Exception
        ) as error:  # templates raise their own refusals, and any error of the expressions in them
            raise RecordError(
                f"the chat template of {self.name} refuses the messages: {error}"
            ) from None

    def _answer(
        self,
        prompt: list[Message],
        prompt_text: str,
        prompt_ids: list[int],
        response: list[Message],
    ) -> list[int]:
        whole = self._render([*prompt, *response])
        if not whole.startswith(prompt_text):
            raise RecordError(
                f"the chat template of {self.name} renders prompt + response differently from the prompt with its "
                "generation prompt, which must be its beginning; fix the template's add_generation_prompt part"
            )
        end, space = self._turn_end(prompt)
        whole = whole.removesuffix(space)
        if not whole.endswith(end):
            raise RecordError(
                f"the chat template of {self.name} does not end this response with {end!r}"
            )
        while end and whole.endswith(end + end):  # the text brought its own
            whole = whole.removesuffix(end)
        # Tokenised with the prompt before it, where the boundary allows: some tokenizers put a space before any text.
        ids = self._ids(whole)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._ids(whole[len(prompt_text) :])
        return ids if end else self._ended(ids)

    def _turn_end(self, prompt: list[Message]) -> tuple[str, str]:
        """What the template puts after an answer: the end of turn, and white space that follows it. Asked once."""
        if self.turn_end is None:
            answer = "una-answer"
            tail = self._render([*prompt, {"role": "assistant", "content": answer}]).rpartition(
                answer
            )[2]
            self.turn_end = tail.rstrip(), tail[len(tail.rstrip()) :]
        return self.turn_end

    def _fit(self, prompt: list[int], response: int) -> list[int]:
        """The prompt within max_prompt_tokens, and within max_tokens together with its longest response."""
        options, bos = self.options, self.tokenizer.bos_token_id
        head = (
            len(self.prefix) if prompt[: len(self.prefix)] == self.prefix else int(prompt[0] == bos)
        )
        room = len(prompt) if options.max_tokens is None else options.max_tokens - response
        limit = min(room, options.max_prompt_tokens or room)
        if len(prompt) <= limit:
            return prompt
        if room <= head:
            raise RecordError(
                f"a response of {response} tokens leaves no room for its prompt within max_tokens={options.max_tokens}"
                "; raise max_tokens or remove the record (responses are never cut)"
            )
        if options.prompt_overflow == "error":
            name = "max_tokens" if limit == room else "max_prompt_tokens"
            raise RecordError(
                f"prompt has {len(prompt)} tokens (longest response: {response}), over {name}={getattr(options, name)}"
                f"; raise {name}, shorten the prompt, or set prompt_overflow: truncate_left"
            )
        return [*prompt[:head], *prompt[len(prompt) - limit + head :]]
