"""Rewards by reward models."""

from __future__ import annotations

import copy
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from una_fast.data.chat_template import render_chat
from una_fast.data.messages import RecordError
from una_fast.logs import say_once
from una_fast.printable import printable
from una_fast.rewards.outcome import Failure, Outcome, PromptText, Reward, chat_text, redacted
from una_fast.rewards.settings import RewardError, RewardSpec, Template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class _Text(NamedTuple):
    """Token ids of a sample; segments: 0 or 1 per token of a pair, if the model reads them."""

    ids: list[int]
    segments: list[int] | None = None


class RewardModel(Reward):
    """A sequence classification model with one label.

    The model is given text, and the model's own tokenizer and template turn the text into tokens:
    token ids of the policy have no meaning for a reward model.
    """

    def __init__(
        self,
        spec: RewardSpec,
        device: torch.device | str,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        """Load the model and the tokenizer.

        spec: an entry of kind "model"
        device: of the model
        dtype: of the weights and the forward pass
        trust_remote_code: run code that comes with the model

        Raises ValueError for a checkpoint that is missing or damaged, or has no reward.
        """
        from una_fast.model.loading import read_tokenizer
        from una_fast.model.places import find

        self.where = f"reward {spec.name}: model {printable(spec.target)}"
        target = find(spec.target, f"{self.where},")
        if (Path(target) / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.where} is a PEFT adapter; give a checkpoint with the adapter merged into "
                "its base"
            )
        remote = {"trust_remote_code": trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(target, **remote)
        model = self._load(target, dtype, remote)
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.config.use_cache = False
        self.embeddings = self.model.get_input_embeddings().weight.shape[0]
        if spec.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"{self.where} has no chat template; set template: plain")
        self.template = self._template(spec.template)
        if self.template == "chat":
            # A template without end stops the run now, not in its first rollout.
            with suppress(RecordError):
                render_chat(self.tokenizer, [{"role": "user", "content": "a"}])
        # Models pool at the last token that is not the config's pad token; without a pad token
        # only single texts are right.
        text_config = model.config.get_text_config()
        self.pad = getattr(text_config, "pad_token_id", None)
        self.batch_size = 1 if self.pad is None else spec.batch_size
        positions = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.limit = spec.max_tokens or min(positions, self.tokenizer.model_max_length)

    def _template(self, given: Template) -> Template:
        """Return the form of the text: the given one, or for "auto" the one of the tokenizer."""
        tokenizer = self.tokenizer
        if given != "auto":
            return given
        if tokenizer.chat_template:
            return "chat"
        takes_pairs = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        return "pair" if takes_pairs else "plain"

    def _load(self, target: str, dtype: torch.dtype, remote: dict[str, bool]) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        from una_fast.model.directory import reading
        from una_fast.model.loading import load_config, refuse_misshapen, refuse_non_finite
        from una_fast.model.places import pretrained, stored_in

        config = load_config(target, **remote)
        if config.num_labels != 1:
            raise ValueError(
                f"{self.where} has {config.num_labels} labels, but a reward is one number; give a "
                "sequence classification model with num_labels=1"
            )
        if stored_in(target) is not None:  # damage, and pickles, are named
            self._check_size(target, config, remote)
        name, where = pretrained(target)
        with reading(target, "reward model"):
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                # Refused below, by name and shape.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **remote,
                **where,
            )
        refuse_misshapen(target, loading["mismatched_keys"], "config.json")
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:5])
            raise ValueError(
                f"{self.where} lacks the weights {missing}, so its rewards would be random; give a "
                "checkpoint that was saved with its classification head"
            )
        if loading["unexpected_keys"]:
            left_out = printable(", ".join(sorted(loading["unexpected_keys"])[:5]))
            say_once(
                logging.WARNING,
                f"{self.where} has no place for {len(loading['unexpected_keys'])} weights of its "
                f"files, and they are left out: {left_out}",
                logger,
            )
        refuse_non_finite(model.named_parameters(), self.where)
        return model

    def _check_size(self, target: str, config: PreTrainedConfig, remote: dict[str, bool]) -> None:
        """Refuse a model that is larger than its weight files, before it is allocated."""
        from transformers import AutoModelForSequenceClassification

        from una_fast.model.directory import ModelError, within_budget
        from una_fast.model.places import element_budget

        quantized = getattr(config, "quantization_config", None) is not None
        budget = element_budget(target, quantized=quantized)
        try:
            with within_budget(target, budget), torch.device("meta"):
                AutoModelForSequenceClassification.from_config(copy.deepcopy(config), **remote)
        except ModelError:
            raise
        except Exception:  # model code may fail in any way without numbers; loading will say
            return

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; a text fails if too long, empty, or refused by the template."""
        outcomes: list[Outcome] = [Failure("not scored")] * len(completions)
        texts: dict[int, _Text] = {}  # of the samples that can be scored
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            found = self._usable_text(prompt, completion)
            if isinstance(found, Failure):
                outcomes[i] = found
            else:
                texts[i] = found
        # Longest first: little padding, and no late surprise.
        order = sorted(texts, key=lambda i: len(texts[i].ids), reverse=True)
        scored = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scored.append(self._forward([texts[i] for i in batch]))
        rewards = torch.cat(scored).tolist() if scored else []  # one wait for the device
        for i, reward in zip(order, rewards, strict=True):
            outcomes[i] = reward
        return outcomes

    def _usable_text(self, prompt: PromptText, completion: str) -> _Text | Failure:
        text = self.text(prompt, completion)
        if isinstance(text, Failure):
            return text
        if not text.ids:
            return Failure("empty text")
        if len(text.ids) > self.limit:
            detail = f"it has {len(text.ids)}; see max_tokens"
            return Failure(f"text over {self.limit} tokens", detail)
        if max(text.ids) >= self.embeddings:
            return Failure("a token without an embedding", str(max(text.ids)))
        return text

    def text(self, prompt: PromptText, completion: str) -> _Text | Failure:
        """Return the tokens of a sample, with a single BOS at most."""
        if self.template == "pair":
            return self._pair(prompt, completion)
        ids = self._ids(prompt, completion)
        return ids if isinstance(ids, Failure) else _Text(ids)

    def _ids(self, prompt: PromptText, completion: str) -> list[int] | Failure:
        if self.template == "chat":
            return self._chat_ids(prompt, completion)
        if not isinstance(prompt, str):
            raise RewardError(
                f"{self.where} is given plain text, but the prompts are chats; use a reward model "
                "with a chat template (template: auto or chat), template: pair, or plain prompts"
            )
        ids = self._tokens(prompt + completion, add_special_tokens=True)
        bos_twice = ids[:2] == [self.tokenizer.bos_token_id] * 2  # the text brought its own
        return ids[1:] if bos_twice else ids

    def _chat_ids(self, prompt: PromptText, completion: str) -> list[int] | Failure:
        messages = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        answer = {"role": "assistant", "content": completion}
        try:
            text = render_chat(self.tokenizer, [*messages, answer])
        except RecordError as error:
            return Failure("the chat template refuses the messages", redacted(error))
        except ValueError as error:
            raise RewardError(f"{self.where}: {redacted(error)}") from error
        return self._tokens(text, add_special_tokens=False)  # the template has written them

    def _pair(self, prompt: PromptText, completion: str) -> _Text:
        """Return the tokens of (question, answer); a chat of one message is the message."""
        question = prompt
        if not isinstance(prompt, str):
            content = prompt[0].get("content") if len(prompt) == 1 else None
            question = content if isinstance(content, str) else chat_text(prompt)
        encoded = self.tokenizer(question, completion, verbose=False)
        return _Text(encoded["input_ids"], encoded.get("token_type_ids"))

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]

    @torch.no_grad()
    def _forward(self, texts: list[_Text]) -> torch.Tensor:
        """Return [B] float32 rewards of B texts, padded on the right: no position moves."""
        width = max(len(text.ids) for text in texts)
        tokens = torch.full((len(texts), width), self.pad or 0)
        mask = torch.zeros_like(tokens)
        segments = torch.zeros_like(tokens)
        for row, text in enumerate(texts):
            tokens[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            if text.segments is not None:
                segments[row, : len(text.ids)] = torch.tensor(text.segments)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if texts[0].segments is not None:
            inputs["token_type_ids"] = segments
        device = self.model.device
        logits = self.model(**{name: value.to(device) for name, value in inputs.items()}).logits
        if logits.shape != (len(texts), 1):
            raise RewardError(
                f"{self.where} gave logits {tuple(logits.shape)} for {len(texts)} texts; a reward "
                "model gives one each"
            )
        return logits[:, 0].float()
