"""Token ids of records: plain text or chat, with a single BOS and a single end of turn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from una_fast.data.chat_template import Chat, Piece, name_of, text_after_answer
from una_fast.data.messages import Message, RecordError
from una_fast.data.records import Record, check_ref_logps
from una_fast.data.settings import RecordOptions
from una_fast.printable import printable, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SYSTEM = ("system", "developer")

# Texts before which a response is tokenised where a tokenizer opens every text with a space.
_BEFORE = ("\n", ".", "x")


class Encoded(NamedTuple):
    """Token ids of a record.

    prompt: [P] int32, P >= 1
    responses: [R_k] int32 for every response k, end of turn included
    scored: [R_k] bool for every response k, True for the tokens of answers: all of a response but
        the messages between its answers
    truncated: the prompt was cut on the left
    special: a text of the record spells a special token of the tokenizer
    raw: the record is plain text, and the tokenizer has a chat template
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...]
    truncated: bool
    special: bool
    raw: bool


@dataclass(frozen=True)
class _Tokens:
    """A response: token ids, and whether each is scored."""

    ids: list[int]
    scored: list[bool]

    @classmethod
    def of_answer(cls, ids: list[int]) -> _Tokens:
        """Score all tokens."""
        return cls(ids, [True] * len(ids))


class Encoder:
    """Records to token ids, under a given tokenizer.

    Plain text: the prompt begins with the tokenizer's own prefix of a text (BOS, if any); a
    response ends with EOS. Prompt and response are tokenised apart, and together spell the prompt
    followed by the response: where a tokenizer opens every text with a space, a response is
    tokenised as the middle of a text. A string prompt stays plain text even if the tokenizer has a
    chat template.

    Chat: the prompt is the template's rendering with the generation prompt; a response is the rest
    of the rendering with the answer, up to the end of turn. BOS is then the template's affair. Of a
    response of several turns, the tokens of other messages, from the end of an answer to the header
    of the next, are there for the model to see, and are not scored.

    Text that spells a special token ("</s>") becomes that token, in plain text and in chats, as
    everywhere in transformers; such records are counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: RecordOptions) -> None:
        """Keep a tokenizer; ValueError without an EOS."""
        self.tokenizer = tokenizer
        self.options = options
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name_of(tokenizer)} has no eos_token, so no response can end; set "
                "eos_token in its tokenizer_config.json, or tokenizer.eos_token in Python"
            )
        self.eos = tokenizer.eos_token_id
        self.prefix = self._prefix()
        self.opens_texts = self._ids("a") != self._ids_inside("a")
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = {*tokenizer.all_special_tokens, *added}
        self._special = _any_of(special)
        self._turn_end: tuple[str, str] | None = None  # asked for with the first chat

    def encode(self, record: Record, room: int = 0) -> Encoded:
        """Return the token ids of a record.

        record: a prompt, and any number of responses
        room: tokens that max_tokens must leave beside the prompt of a record without responses

        Raises RecordError for texts without tokens, over the limits, or refused by the template;
        for preferences between equal tokens; and for ref_logps that the tokens cannot have.
        """
        if isinstance(record.prompt, str):
            prompt, responses, truncated = self._plain_ids(record, room)
        else:
            prompt, responses, truncated = self._chat_ids(record, room)
        ids = [response.ids for response in responses]
        _refuse_equals(record, ids, pairs=self.options.feedback != "scores")
        check_ref_logps(record, [sum(response.scored) for response in responses])
        return Encoded(
            prompt=np.asarray(prompt, dtype=np.int32),
            responses=tuple(np.asarray(response, dtype=np.int32) for response in ids),
            scored=tuple(np.asarray(response.scored) for response in responses),
            truncated=truncated,
            special=any(self._special.search(text) for text in _texts_of(record)),
            raw=isinstance(record.prompt, str) and bool(self.tokenizer.chat_template),
        )

    def _plain_ids(self, record: Record, room: int) -> tuple[list[int], list[_Tokens], bool]:
        """Return the prompt, the responses, and whether the prompt was cut."""
        prompt = self._ids(record.prompt)
        if prompt[: len(self.prefix)] != self.prefix:
            prompt = [*self.prefix, *prompt]
        inside = self._ids_inside if self.opens_texts else self._ids
        answers = [self._ended(inside(response)) for response in record.responses]
        responses = [_Tokens.of_answer(ids) for ids in answers]
        excess = self._excess(prompt, responses, room)
        if excess:
            kept = self._kept_at_the_start(prompt)
            prompt = [*prompt[:kept], *prompt[kept + excess :]]
        return prompt, responses, excess > 0

    def _chat_ids(self, record: Record, room: int) -> tuple[list[int], list[_Tokens], bool]:
        """Return the prompt, the responses, and whether the oldest turns were left out.

        Turns go as wholes: a chat without its system message, or without the header of a turn, is
        none. Where the last turn alone is too long, its text is cut on the left.
        """
        found = self._rendered(record.prompt, record)
        if not self._excess(*found, room):
            return *found, False
        system, starts = _where_to_cut(record.prompt)

        def without_turns(number: int) -> list[Message]:
            return [*system, *record.prompt[starts[number] :]]

        last, *others = record.prompt[starts[-1] if starts else len(system) :] or [None]
        text = "" if last is None else last.get("content") or ""

        def without_characters(number: int) -> list[Message]:
            return [*system, {**last, "content": text[number + 1 :]}, *others]

        found = self._first_that_fits(record, room, len(starts), without_turns)
        if found is None:
            found = self._first_that_fits(record, room, len(text) - 1, without_characters)
        if found is None:
            raise RecordError(
                "the system message and the headers of the last turn alone are over "
                f"{self._limits()}; raise the limit, or shorten the record"
            )
        return *found, True

    def _first_that_fits(
        self,
        record: Record,
        room: int,
        count: int,
        shortened: Callable[[int], list[Message]],
    ) -> tuple[list[int], list[_Tokens]] | None:
        """Return the tokens of the longest of some prompts that fits, with the responses.

        record: has the responses
        room: as in `encode`
        count: of the prompts
        shortened: number of a prompt -> messages; a higher number has fewer tokens
        """
        low, high = 0, count
        fitting = None
        while low < high:
            middle = (low + high) // 2
            found = self._rendered(shortened(middle), record)
            if self._excess(*found, room):
                low = middle + 1
            else:
                fitting = found
                high = middle
        return fitting

    def _rendered(self, prompt: list[Message], record: Record) -> tuple[list[int], list[_Tokens]]:
        """Return the token ids of a prompt, perhaps shortened, and the responses of a record."""
        end = self._end_of(prompt, record.variables) if record.responses else ("", "")
        chat = Chat(self.tokenizer, record.variables, end)
        text = chat.asked(prompt)
        ids = self._ids(text)
        responses = []
        for response in record.responses:
            pieces = chat.pieces(prompt, text, response)
            responses.append(self._tokens_of(pieces, text, ids))
        return ids, responses

    def _tokens_of(
        self, pieces: Sequence[Piece], prompt_text: str, prompt_ids: list[int]
    ) -> _Tokens:
        """Return the tokens of a response.

        pieces: answers, and the messages between them
        prompt_text, prompt_ids: the rendering before the response
        """
        text, ids = prompt_text, list(prompt_ids)
        scored = []
        for piece in pieces:
            own = self._ids_after(text, ids, piece.text)
            if piece.is_answer and not piece.has_end:
                own = self._ended(own)
            text += piece.text
            ids += own
            scored += [piece.is_answer] * len(own)
        return _Tokens(ids[len(prompt_ids) :], scored)

    def _ids_after(self, text: str, ids: list[int], piece: str) -> list[int]:
        """Return the tokens of a text that follows another text with known tokens.

        Tokenised with the text before it, where the boundary allows: some tokenizers put a space
        before any text.
        """
        whole = self._ids(text + piece)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        return self._ids_inside(piece)

    def _ids(self, text: str) -> list[int]:
        try:
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
        except Exception as error:  # such as half a surrogate pair that a template wrote
            raise RecordError(
                f"tokenizer {name_of(self.tokenizer)} refuses the text {shown(text)}: "
                f"{printable(error)}"
            ) from None
        return encoded["input_ids"]

    def _ids_inside(self, text: str) -> list[int]:
        """Return the tokens of a text as they are in the middle of another text."""
        for before in _BEFORE:
            start = self._ids(before)
            ids = self._ids(before + text)
            if ids[: len(start)] == start and len(ids) > len(start):
                return ids[len(start) :]
        return self._ids(text)

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

    def _end_of(self, prompt: list[Message], variables: dict[str, Any]) -> tuple[str, str]:
        """Return the end of every answer, and the white space after it, in the chat template.

        prompt, variables: of any chat, for the first call
        """
        if self._turn_end is None:
            self._turn_end = text_after_answer(self.tokenizer, prompt, variables)
        return self._turn_end

    def _ended(self, ids: list[int]) -> list[int]:
        """Return ids with a single EOS at the end."""
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        if not ids:
            raise RecordError(
                "response is empty: it has no tokens but EOS; fill it in or remove the record"
            )
        return [*ids, self.eos]

    def _excess(self, prompt: list[int], responses: Sequence[_Tokens], room: int) -> int:
        """Return by how many tokens a prompt is over max_prompt_tokens or max_tokens.

        prompt: token ids, with those at the start that no cut takes away
        responses: the longest counts
        room: tokens of a response, where there is none so far

        Raises RecordError where a cut is not wanted, or would leave nothing of the prompt.
        """
        options = self.options
        if not prompt:
            raise RecordError("prompt gives no tokens; fill it in or remove the record")
        longest = max((len(response.ids) for response in responses), default=room)
        most = len(prompt)
        if options.max_tokens is not None:
            most = options.max_tokens - longest
        limit = min(most, options.max_prompt_tokens or most)
        if len(prompt) <= limit:
            return 0
        if most <= self._kept_at_the_start(prompt):
            raise RecordError(
                f"a response of {longest} tokens leaves no room for its prompt within "
                f"max_tokens={options.max_tokens}; raise max_tokens or remove the record "
                "(responses are never cut)"
            )
        if options.prompt_overflow == "error":
            name = "max_tokens" if limit == most else "max_prompt_tokens"
            raise RecordError(
                f"prompt has {len(prompt)} tokens (longest response: {longest}), over "
                f"{name}={getattr(options, name)}; raise {name}, shorten the prompt, "
                "or set prompt_overflow: truncate_left"
            )
        return len(prompt) - limit

    def _limits(self) -> str:
        """Return the limits that are set, for messages."""
        names = ("max_prompt_tokens", "max_tokens")
        limits = {name: getattr(self.options, name) for name in names}
        return " and ".join(f"{name}={limit}" for name, limit in limits.items() if limit)

    def _kept_at_the_start(self, prompt: list[int]) -> int:
        """Return how many tokens a cut leaves at the start of a prompt: the prefix, or BOS."""
        if prompt[: len(self.prefix)] == self.prefix:
            return len(self.prefix)
        return int(prompt[0] == self.tokenizer.bos_token_id)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the texts.

    Texts of one beginning are one branch: a model has a thousand special tokens such as
    "<|reserved_7|>", and every branch is tried at every place.
    """
    branches = []
    for beginning, group in itertools.groupby(sorted(texts), key=lambda text: text[:2]):
        rests = "|".join(re.escape(text[2:]) for text in group)
        branches.append(f"{re.escape(beginning)}(?:{rests})")
    return re.compile("|".join(branches))


def _where_to_cut(prompt: list[Message]) -> tuple[list[Message], list[int]]:
    """Return the system messages at the start of a chat, and the later indices of user messages.

    A chat may begin at a user message: an answer, or the result of a tool, needs what it answers.
    """
    others = (k for k, message in enumerate(prompt) if message["role"] not in _SYSTEM)
    first = next(others, len(prompt))
    starts = [k for k in range(first + 1, len(prompt)) if prompt[k]["role"] == "user"]
    return prompt[:first], starts


def _refuse_equals(record: Record, responses: Sequence[list[int]], *, pairs: bool) -> None:
    """Check that a preference is between different tokens.

    record: a pair, or rated responses
    responses: [K] token ids
    pairs: rated responses become pairs

    Raises RecordError, by the names of the responses.
    """
    if record.label is not None or (record.ratings is not None and not pairs):
        return
    names = [f"completions[{k}]" for k in range(len(responses))]
    if len(responses) == 2 and record.ratings is None:
        names = ["chosen", "rejected"]
    first_with: dict[tuple[int, ...], int] = {}
    for k, response in enumerate(responses):
        first = first_with.setdefault(tuple(response), k)
        tied = record.ratings is not None and record.ratings[first] == record.ratings[k]
        if first != k and not tied:
            raise RecordError(
                f"{names[first]} and {names[k]} have the same tokens, which prefers nothing (what "
                "tells their texts apart is lost in the tokenizer or the template); remove the "
                "record"
            )


def _texts_of(record: Record) -> Iterator[str]:
    """Yield the texts that somebody wrote: prompt and responses, or the contents of messages."""
    for text in (record.prompt, *record.responses):
        if isinstance(text, str):
            yield text
            continue
        for message in text:
            yield message.get("content", "")
