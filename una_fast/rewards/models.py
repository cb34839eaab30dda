"""Rewards by reward models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from una_fast.rewards.outcome import EXCERPT, Failure, Outcome, PromptText, Reward
from una_fast.rewards.settings import RewardError, RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

        Raises ValueError for a checkpoint without a reward, OSError for a missing checkpoint.
        """
        from transformers import AutoTokenizer

        self.where = f"reward {spec.name}: model {spec.target}"
        if (Path(spec.target) / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.where} is a PEFT adapter; give a checkpoint with the adapter merged into "
                "its base"
            )
        remote = {"trust_remote_code": trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            spec.target, **remote
        )
        model = self._load(spec.target, dtype, remote)
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.config.use_cache = False
        if spec.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"{self.where} has no chat template; set template: plain")
        self.chat = spec.template != "plain" and bool(self.tokenizer.chat_template)
        # Models pool at the last token that is not the config's pad token; without a pad token
        # only single texts are right.
        text_config = model.config.get_text_config()
        self.pad = getattr(text_config, "pad_token_id", None)
        self.batch_size = 1 if self.pad is None else spec.batch_size
        positions = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.limit = spec.max_tokens or min(positions, self.tokenizer.model_max_length)

    def _load(self, target: str, dtype: torch.dtype, remote: dict[str, bool]) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(target, **remote)
        if config.num_labels != 1:
            raise ValueError(
                f"{self.where} has {config.num_labels} labels, but a reward is one number; give a "
                "sequence classification model with num_labels=1"
            )
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            target, config=config, dtype=dtype, output_loading_info=True, **remote
        )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:5])
            raise ValueError(
                f"{self.where} lacks the weights {missing}, so its rewards would be random; give a "
                "checkpoint that was saved with its classification head"
            )
        return model

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; a text fails if too long, empty, or refused by the template."""
        outcomes: list[Outcome] = [Failure("not scored")] * len(completions)
        ids: dict[int, list[int]] = {}  # of the samples that can be scored
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            found = self._usable_ids(prompt, completion)
            if isinstance(found, Failure):
                outcomes[i] = found
            else:
                ids[i] = found
        # Longest first: little padding, and no late surprise.
        order = sorted(ids, key=lambda i: len(ids[i]), reverse=True)
        scored = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scored.append(self._forward([ids[i] for i in batch]))
        rewards = torch.cat(scored).tolist() if scored else []  # one wait for the device
        for i, reward in zip(order, rewards, strict=True):
            outcomes[i] = reward
        return outcomes

    def _usable_ids(self, prompt: PromptText, completion: str) -> list[int] | Failure:
        ids = self.ids(prompt, completion)
        if isinstance(ids, Failure):
            return ids
        if not ids:
            return Failure("empty text")
        if len(ids) > self.limit:
            return Failure(f"text over {self.limit} tokens", f"it has {len(ids)}; see max_tokens")
        return ids

    def ids(self, prompt: PromptText, completion: str) -> list[int] | Failure:
        """Return the token ids of a sample, with a single BOS at most."""
        if self.chat:
            return self._chat_ids(prompt, completion)
        if not isinstance(prompt, str):
            raise RewardError(
                f"{self.where} is given plain text, but the prompts are chats; use a reward model "
                "with a chat template (template: auto or chat), or plain prompts"
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
            text = self.tokenizer.apply_chat_template([*messages, answer], tokenize=False)
        except Exception as error:
            # Templates raise their own refusals, and any error of the expressions in them.
            return Failure("the chat template refuses the messages", str(error)[:EXCERPT])
        return self._tokens(text, add_special_tokens=False)  # the template has written them

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        """Return [B] float32 rewards of B texts, padded on the right: no position moves."""
        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self.pad or 0)
        mask = torch.zeros_like(tokens)
        for row, own in enumerate(ids):
            tokens[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        device = self.model.device
        logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        if logits.shape != (len(ids), 1):
            raise RewardError(
                f"{self.where} gave logits {tuple(logits.shape)} for {len(ids)} texts; a reward "
                "model gives one each"
            )
        return logits[:, 0].float()
