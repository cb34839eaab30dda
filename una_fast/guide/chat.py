"""Talk to a model: `una-fast chat`, before and after side by side with --compare.

messages -> the encoder of training -> token ids -> generate, shown word by word -> messages
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from una_fast.data.encode import Encoder
from una_fast.data.records import Record
from una_fast.data.settings import RecordOptions
from una_fast.distributed import start_world
from una_fast.guide.run_of import base_of, model_of, quantize_base_of
from una_fast.guide.settings import ChatConfig
from una_fast.head.engines import compute_dtype
from una_fast.model.loading import load_causal_lm, load_tokenizer
from una_fast.model.positions import positions_of
from una_fast.online.sampling import drawn_at, stop_ids
from una_fast.printable import printable_lines, told
from una_fast.signals import Stopped, requests

SIDES = ("before", "after")
WIDE = 100  # columns of a terminal from which two answers stand side by side
GAP = 3  # columns between them


def chat(settings: ChatConfig) -> None:
    """Answer one prompt, the lines of the input, or a person; until the input ends."""
    speakers = load_speakers(settings)
    if not speakers[-1].tokenizer.chat_template:
        print(
            f"una-fast chat: {told(settings.run)} has no chat template, and goes on with your text",
            file=sys.stderr,
        )
    if settings.prompt is not None:
        answer_all(speakers, settings.prompt)
        return
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                print(f"> {printable_lines(line.strip())}")
                answer_all(speakers, line.strip())
                print()
                for speaker in speakers:
                    speaker.messages.clear()
        return
    print("Ctrl-C stops an answer, Ctrl-D ends.")
    for line in _lines_of_a_person():
        answer_all(speakers, line)


def _lines_of_a_person() -> Iterator[str]:
    """Yield what a person types, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets `input` edit the line, and remember earlier ones
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


# ---- speakers ----------------------------------------------------------------------------------


@dataclass
class Speaker:
    """A model in a conversation.

    name: one of SIDES
    encoder: of training
    longest: tokens of an answer, at most
    adapter_off: the model answers without its adapter
    messages: turns so far, answers included
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    settings: ChatConfig
    longest: int
    adapter_off: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, text: str, *, show: bool) -> str:
        """Return the answer to the next turn of the user.

        text: of the turn; without a chat template, the text to go on with
        show: write the answer on stdout as it comes
        """
        prompt: str | list[dict[str, Any]] = text
        if self.tokenizer.chat_template:
            self.messages.append({"role": "user", "content": text})
            prompt = self.messages
        ids = self.encoder.encode(Record(prompt), room=self.longest).prompt
        streamer = _Shown(self.tokenizer, show=show)
        torch.manual_seed(self.settings.seed)
        tokens = torch.tensor(ids[None].astype("int64"), device=self.model.device)
        off = contextlib.nullcontext()
        if self.adapter_off:
            off = self.model.disable_adapter()
        try:
            with off, requests.at_once(), torch.inference_mode():
                self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=self._generation(),
                    streamer=streamer,
                )
        except KeyboardInterrupt as error:
            if isinstance(error, Stopped) and error.number != signal.SIGINT:
                raise
            streamer.end()
        if self.tokenizer.chat_template:
            self.messages.append({"role": "assistant", "content": streamer.text or " "})
        return streamer.text

    def _generation(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.longest,
            eos_token_id=list(stop_ids(self.tokenizer, self.model)) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **drawn_at(self.settings.temperature),
        )


def load_speakers(settings: ChatConfig) -> list[Speaker]:
    """Load the model of a run, and with settings.compare the model before the run too."""
    path = model_of(settings.run)
    tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    device = start_world(settings.device).device
    after = _load(settings, path, device)
    found = [_speaker(settings, "after", after, tokenizer)]
    if settings.compare:
        off = isinstance(after, PeftModel)
        before = after if off else _load(settings, model_of(base_of(path)), device)
        found.insert(0, _speaker(settings, "before", before, tokenizer, adapter_off=off))
    return found


def _load(settings: ChatConfig, path: str, device: torch.device) -> PreTrainedModel | PeftModel:
    dtype = compute_dtype(settings, device.type)
    model = load_causal_lm(
        path,
        dtype=dtype,
        trust_remote_code=settings.trust_remote_code,
        quantize_base=quantize_base_of(path),
    )
    # Penalties and the like of the model's own settings would stand beside ours.
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    inside.generation_config = GenerationConfig()
    return model.to(device).eval()


def _speaker(
    settings: ChatConfig,
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter_off: bool = False,
) -> Speaker:
    # Of a conversation longer than the model's positions the oldest turns are left out.
    positions = positions_of(model)
    limits = RecordOptions(max_tokens=positions, prompt_overflow="truncate_left")
    longest = settings.max_new_tokens
    if positions is not None:
        longest = max(min(longest, positions // 2), 1)  # the rest is for the conversation
    encoder = Encoder(tokenizer, limits)
    return Speaker(name, model, tokenizer, encoder, settings, longest, adapter_off)


class _Shown(TextStreamer):
    """Writes an answer as it comes, word by word.

    text: so far
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next words."""
        self.text += text
        if self.show:
            print(printable_lines(text), end="\n" if stream_end else "", flush=True)


# ---- one turn of all ---------------------------------------------------------------------------


def answer_all(speakers: Sequence[Speaker], text: str) -> None:
    """Show the answers of all speakers to the next turn: side by side where there is room."""
    columns = shutil.get_terminal_size((80, 24)).columns
    if len(speakers) == 1:
        speakers[0].answer(text, show=True)
        return
    if columns < WIDE or not sys.stdout.isatty():
        for speaker in speakers:
            print(f"--- {speaker.name}")
            speaker.answer(text, show=True)
        return
    answers = [printable_lines(speaker.answer(text, show=False)) for speaker in speakers]
    names = [speaker.name for speaker in speakers]
    print("\n".join(side_by_side(names, answers, columns)))


def side_by_side(names: Sequence[str], texts: Sequence[str], columns: int) -> list[str]:
    """Return texts in columns under their names, as lines of at most `columns` characters."""
    width = (columns - GAP * (len(texts) - 1)) // len(texts)
    cells = []
    for name, text in zip(names, texts, strict=True):
        lines = [name, "-" * len(name)]
        for line in text.splitlines():
            lines += textwrap.wrap(line, width) or [""]
        cells.append(lines)
    height = max(map(len, cells))
    rows = []
    for number in range(height):
        parts = [lines[number] if number < len(lines) else "" for lines in cells]
        rows.append((" " * GAP).join(part.ljust(width) for part in parts).rstrip())
    return rows
