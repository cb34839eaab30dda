"""Rewards by reward models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from una_fast.rewards.outcome import EXCERPT, Failure, Outcome, PromptText, Reward
from una_fast.rewards.settings import RewardError, RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# --- reward models ----------------------------------------------------------------------------------------------------


class RewardModel(Reward):
    """A sequence classification model with one label. It gets text, which its own tokenizer and template turn into its
    own tokens: those of the policy mean nothing to it."""

    def __init__(
        self,
        spec: RewardSpec,
        device: torch.device | str,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        self.where = f"reward {spec.name}: model {spec.target}"
        if (Path(spec.target) / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.where} is a PEFT adapter; give a checkpoint with the adapter merged into its base"
            )
        remote = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(spec.target, **remote)
        if config.num_labels != 1:
            raise ValueError(
                f"{self.where} has {config.num_labels} labels, but a reward is one number; give a sequence "
                "classification model with num_labels=1"
            )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            spec.target, **remote
        )
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            spec.target, config=config, dtype=dtype, output_loading_info=True, **remote
        )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:5])
            raise ValueError(
                f"{self.where} lacks the weights {missing}, so its rewards would be random; give a checkpoint that was "
                "saved with its classification head"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.config.use_cache = False
        if spec.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"{self.where} has no chat template; set template: plain")
        self.chat = spec.template != "plain" and bool(self.tokenizer.chat_template)
        # Models pool at the last token that is not the config's pad token; without one only single texts are right.
        text_config = config.get_text_config()
        self.pad = getattr(text_config, "pad_token_id", None)
        self.batch_size = 1 if self.pad is None else spec.batch_size
        positions = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.limit = spec.max_tokens or min(positions, self.tokenizer.model_max_length)

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        outcomes: list[Outcome] = [Failure("not scored")] * len(completions)
        ids: dict[int, list[int]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            found = self.ids(prompt, completion)
            if isinstance(found, Failure):
                outcomes[i] = found
            elif not found:
                outcomes[i] = Failure("empty text")
            elif len(found) > self.limit:
                outcomes[i] = Failure(
                    f"text over {self.limit} tokens", f"it has {len(found)}; see max_tokens"
                )
            else:
                ids[i] = found
        order = sorted(
            ids, key=lambda i: len(ids[i]), reverse=True
        )  # longest first: little padding, no late surprise
        batches = [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]
        scored = [self._forward([ids[i] for i in batch]) for batch in batches]
        if scored:
            for i, reward in zip(order, torch.cat(scored).tolist(), strict=True):
                outcomes[i] = reward
        return outcomes

    def ids(self, prompt: PromptText, completion: str) -> list[int] | Failure:
        """Tokens of one sample, with one BOS at most."""
        if not self.chat:
            if not isinstance(prompt, str):
                raise RewardError(
                    f"{self.where} is given plain text, but the prompts are chats; use a reward model with a chat "
                    "template (template: auto or chat), or plain prompts"
                )
            ids = self._tokens(prompt + completion, add_special_tokens=True)
            twice = ids[:2] == [self.tokenizer.bos_token_id] * 2  # the text brought its own
            return ids[1:] if twice else ids
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": completion}], tokenize=False
            )
        except (
            Exception
        ) as error:  # templates raise their own refusals, and any error of the expressions in them
            return Failure("the chat template refuses the messages", str(error)[:EXCERPT])
        return self._tokens(text, add_special_tokens=False)  # the template has written them

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        """[B] float32 rewards of B texts, padded on the right, where padding moves no position."""
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
                f"{self.where} gave logits {tuple(logits.shape)} for {len(ids)} texts; a reward model gives one each"
            )
        return logits[:, 0].float()
