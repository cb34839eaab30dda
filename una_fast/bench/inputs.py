"""The tensors of all contenders: hidden states and heads of policy and reference.

The work of a contender: forward and backward of a loss over S responses of N rows in all, policy
and reference, head trained or frozen. Pairs carry the DPO loss, single responses
(s - sigmoid(r))^2. A contender leaves gradients in x.hidden.grad and, with a trained head, in
x.weight.grad and x.bias.grad.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast.feedback import Feedback

BETA = 0.1
# Of the target's logit, and of all other logits: half of the probability lies on the target.
PEAK, SPREAD = 24.0, 4.0
HEADS = ("trained", "frozen")


class Form(NamedTuple):
    """The form of a head: z = softcap * tanh(logit_scale * (W h + bias) / softcap).

    softcap: if any
    logit_scale: factor of W h + bias
    has_bias: whether a bias is added
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    has_bias: bool = False

    def extras(self) -> list[str]:
        """Return the names of the parts beyond W h."""
        found = ["softcap"] if self.softcap is not None else []
        found += ["logit scale"] if self.logit_scale != 1.0 else []
        return found + ["bias"] * self.has_bias

    def logits_(self, raw: Tensor) -> Tensor:
        """Turn W h + bias into logits, in place."""
        raw.mul_(self.logit_scale)
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, raw: Tensor) -> Tensor:
        """Turn W h + bias into logits, with a graph."""
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def slope_(self, logits: Tensor) -> Tensor | float:
        """Return dz/d(W h + bias) at the logits z; a slope of every logit is written over z."""
        if self.softcap is None:
            return self.logit_scale
        share = logits.div_(self.softcap).square_()  # of the cap, squared
        return share.neg_().add_(1.0).mul_(self.logit_scale)


PLAIN = Form()


class Inputs:
    """S responses of `lengths` rows: (chosen, rejected), (chosen, rejected), … or, with scores,
    singles.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        dim: int,
        vocab: int,
        *,
        scores: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        form: Form = PLAIN,
    ) -> None:
        self.dim, self.vocab, self.form = dim, vocab, form
        self.bias: Tensor | None = None
        self._lay_out(lengths)
        self.fill(device, dtype)
        count = len(self.lengths)
        self.scores: Tensor | None = None
        if scores:
            self.scores = torch.linspace(0, 1, count, device=device, dtype=torch.float64)
            self.feedback = Feedback.scores(range(count), self.scores.tolist())
        else:
            self.feedback = Feedback.pairs(range(0, count, 2), range(1, count, 2))
        self.head("trained")

    def _lay_out(self, lengths: Sequence[int]) -> None:
        self.lengths, self.rows = list(lengths), sum(lengths)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def fill(self, device: str, dtype: torch.dtype) -> None:
        """Draw hidden, ref_hidden [N, D], weight, ref_weight [V, D] and targets [N] at random.

        With a bias in the form, bias [V] too. Logits are as peaked for every form.
        """
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device, dtype=dtype)

        drift = max(self.lengths) ** -0.5  # of the reference: rewards of order 1 at every length
        spread, peak = SPREAD / self.form.logit_scale, PEAK / self.form.logit_scale
        self.weight = normal(self.vocab, self.dim).mul_(self.dim**-0.5)
        self.targets = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        target_weights = self.weight[self.targets]  # [N, D]
        self.hidden = normal(self.rows, self.dim).mul_(spread).add_(target_weights, alpha=peak)
        self.ref_hidden = normal(self.rows, self.dim).mul_(drift).add_(self.hidden)
        noise = normal(self.vocab, self.dim).mul_(drift * self.dim**-0.5)
        self.ref_weight = noise.add_(self.weight)
        if self.form.has_bias:
            self.bias = normal(self.vocab).div_(self.form.logit_scale)

    def take(self, tensors: Mapping[str, Tensor], device: str, dtype: torch.dtype) -> None:
        """Take tensors in the place of random numbers; bfloat16 rounds float32.

        tensors: hidden, ref_hidden [N, D], weight, ref_weight [V, D], targets [N], perhaps bias [V]
        device: to move the tensors to
        dtype: of the floating-point tensors
        """
        for name, tensor in tensors.items():
            wide = tensor.to(device)
            setattr(self, name, wide.to(dtype) if wide.is_floating_point() else wide)

    def head(self, head: str) -> None:
        """Make the head "trained" or "frozen", and drop all gradients."""
        self.clear()
        self.hidden.requires_grad_()
        self.weight.requires_grad_(head == "trained")
        if self.bias is not None:
            self.bias.requires_grad_(head == "trained")

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ref_bias(self) -> Tensor | None:
        """Return the bias of the reference: the policy's, detached."""
        return None if self.bias is None else self.bias.detach()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that get a gradient, by name."""
        found = {"hidden": self.hidden}
        if self.trained:
            found["weight"] = self.weight
        if self.trained and self.bias is not None:
            found["bias"] = self.bias
        return found

    def reference(self) -> Inputs:
        """Return the same inputs with the reference in the place of the policy."""
        found = copy.copy(self)
        found.hidden, found.weight = self.ref_hidden, self.ref_weight
        found.bias = self.ref_bias
        return found

    def of_length(self, rows: int) -> Inputs:
        """Return inputs with `rows` rows per response and the same heads.

        Rows are the first of every response; a short response begins again.
        """
        found = copy.copy(self)
        starts = self.cu_seqlens[:-1].tolist()
        places = []
        for start, length in zip(starts, self.lengths, strict=True):
            places.append(start + torch.arange(rows) % length)
        index = torch.cat(places).to(self.device)
        for name in ("hidden", "ref_hidden", "targets"):
            setattr(found, name, getattr(self, name).detach()[index])
        # Leaves of their own, on the same memory: gradients are not shared.
        trained = "trained" if self.trained else "frozen"
        found.weight = self.weight.detach()
        found.bias = self.ref_bias
        found._lay_out([rows] * len(self.lengths))
        found.head(trained)
        return found

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in (self.hidden, self.weight, self.bias):
            if leaf is not None:
                leaf.grad = None

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum [N] numbers per response, in the precision given; returns [S]."""
        return torch.stack([part.sum() for part in per_token.split(self.lengths)])

    def loss_of(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Compute the loss from sums of log-probs [S]."""
        rewards = BETA * (logps - ref_logps)
        if self.scores is None:
            return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        return (rewards.sigmoid() - self.scores).square().mean()


class StatesInputs(Inputs):
    """Inputs of given states and heads in the place of random numbers."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        lengths: Sequence[int],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        form: Form = PLAIN,
    ) -> None:
        """Take tensors, rounded to a dtype.

        tensors: hidden, ref_hidden [N, D], weight, ref_weight [V, D], targets [N], perhaps bias [V]
        lengths: rows of the responses
        device: to move the tensors to
        dtype: of the floating-point tensors
        form: of the head
        """
        self.tensors = tensors
        vocab, dim = tensors["weight"].shape
        super().__init__(lengths, dim, vocab, device=device, dtype=dtype, form=form)
        del self.tensors

    def fill(self, device: str, dtype: torch.dtype) -> None:
        """Take the given tensors."""
        self.take(self.tensors, device, dtype)
