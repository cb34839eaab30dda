"""The contenders: una_fast, eager PyTorch, and peers, called as the trainers of the peers do.

una_fast       linear_una_loss; log-probs: token_logps, sums: sequence_logps
eager          F.linear, float32 log_softmax over all rows, gather
torch.compile  the same under torch.compile
trl            trl.kernels.ChunkedLogProbFunction as TRL's patched forward applies the function to
               the gathered response rows: tiles of 32768 vocabulary entries, temperature 1,
               log-probs alone; sums and loss from PyTorch
cce            cut_cross_entropy.linear_cross_entropy(reduction="none"), defaults otherwise
liger          liger_kernel.chunked_loss.LigerFusedLinearDPOLoss on [2 B, T, D], chosen first,
               compiled on a GPU as by default

`Contender.unavailable` says why a contender cannot do the work, or is not installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast.bench.inputs import BETA, PLAIN, Form, Inputs
from una_fast.head.ops import linear_una_loss, sequence_logps, token_logps
from una_fast.head.plan import workspace_bytes
from una_fast.losses import Objective

TRL_CHUNK = 32768  # as trl/trainer/utils.py calls it
SMALL_WORKSPACE_MB = 16


class Contender:
    """A participant in the bench, under `name`.

    module: the package to be imported
    install: the name of the module for pip
    passes: GEMM passes of 2 N D V flop, with a trained and with a frozen head
    takes: computable parts of a head's form beyond W h, see Form.extras
    rounds_logits: the logits, or the target's logit alone, are rounded to the dtype of the
        operands, so that sums of log-probs, and with the sums the coefficient of a pair, carry
        noise
    same_work: False for a contender with other work
    """

    name: str
    module: str | None = None  # to be imported
    install: str | None = None
    needs_cuda = False
    passes = {"trained": 4, "frozen": 3}
    takes: frozenset[str] = frozenset()
    rounds_logits = False
    same_work = True
    pairs_only = False

    def unavailable(self, x: Inputs) -> str | None:
        """Return the reason why the contender cannot do the work here, or None."""
        if self.needs_cuda and x.device.type != "cuda":
            return "needs a GPU"
        if self.pairs_only and (x.scores is not None or len(set(x.lengths)) > 1):
            return "takes pairs of one length only"
        lacking = [part for part in x.form.extras() if part not in self.takes]
        if lacking:
            return f"takes no {' and no '.join(lacking)}, and this head has one"
        return self.not_importable()

    def not_importable(self) -> str | None:
        """Return why the module cannot be imported, or None."""
        module = self.module or "torch"
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way
            package = module.split(".")[0]
            if self.install and importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {self.install}"
            return f"cannot import {self.module}: {error}"
        return None

    def small(self) -> Contender:
        """Return the contender with the smallest workspace, to see the memory of a row."""
        return self

    def fixed_bytes(self, x: Inputs) -> int | None:
        """Return the bytes of the workspace, if the contender has a workspace."""
        return None

    def rows_at_once(self) -> int | None:
        """Return the rows with logits at the same time; None for all rows of a call."""
        return None

    def loss(self, x: Inputs) -> Tensor:
        """Compute the loss of x, with a graph."""
        raise NotImplementedError

    def logps(self, x: Inputs) -> Tensor | None:
        """Return [N] log-probs of the policy, None from a contender that exposes no log-probs."""
        return None

    def sums(self, x: Inputs) -> Tensor | None:
        """Return [S] sums of log-probs as the contender's users form sums."""
        logps = self.logps(x)
        return None if logps is None else x.sums(logps)


EVERY_FORM = frozenset({"softcap", "logit scale", "bias"})


class Una(Contender):
    """una_fast: the fused loss, and log-probs without gradient."""

    takes = EVERY_FORM

    def __init__(
        self, workspace_mb: float | None = None, engine: str = "auto", name: str = "una_fast"
    ) -> None:
        self.workspace_mb, self.engine = workspace_mb, engine
        self.name = name if workspace_mb is None else f"{name} {workspace_mb:g} MiB"

    def small(self) -> Una:
        return Una(SMALL_WORKSPACE_MB, self.engine)

    def fixed_bytes(self, x: Inputs) -> int:
        return workspace_bytes(x.device.type, self.workspace_mb)

    def loss(self, x: Inputs) -> Tensor:
        return linear_una_loss(
            x.hidden,
            x.weight,
            x.targets,
            x.cu_seqlens,
            x.feedback,
            objective=Objective(beta=BETA),
            ref_hidden=x.ref_hidden,
            ref_weight=x.ref_weight,
            ref_bias=x.ref_bias,
            **self._head(x),
        ).loss

    def logps(self, x: Inputs) -> Tensor:
        return token_logps(x.hidden, x.weight, x.targets, **self._head(x))

    def sums(self, x: Inputs) -> Tensor:
        return sequence_logps(x.hidden, x.weight, x.targets, x.cu_seqlens, **self._head(x))

    def _head(self, x: Inputs) -> dict[str, Any]:
        """Return the keywords of bias, form, engine and workspace."""
        form = {"softcap": x.form.softcap, "logit_scale": x.form.logit_scale}
        options = {"engine": self.engine, "workspace_mb": self.workspace_mb}
        return {"bias": x.bias, **form, **options}


class PerToken(Contender):
    """Log-probs per token [N]; the loss follows from the sums.

    A class gives `per_token`, or, for heads of every form, `per_token_of`.
    """

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return [N] log-probs from hidden [N, D], weight [V, D] and targets [N]."""
        raise NotImplementedError

    def per_token_of(self, x: Inputs) -> Tensor:
        """Return [N] log-probs of inputs, for every form in `takes`."""
        return self.per_token(x.hidden, x.weight, x.targets)

    def logps(self, x: Inputs) -> Tensor:
        return self.per_token_of(x)

    def loss(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            ref = x.sums(self.per_token_of(x.reference()))
        return x.loss_of(self.sums(x), ref)


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    form: Form = PLAIN,
) -> Tensor:
    """Return [N] log-probs from full rows of logits.

    hidden: [N, D]
    weight: [V, D]
    targets: [N]
    bias: [V]
    form: of the logits
    """
    logits = form.logits(F.linear(hidden, weight, bias))
    logps = logits.float().log_softmax(-1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1)


class Eager(PerToken):
    """Plain PyTorch, as transformers computes logits and TRL without a kernel log-probs."""

    name = "eager"
    rounds_logits = True
    takes = EVERY_FORM

    def per_token_of(self, x: Inputs) -> Tensor:
        return full_logits(x.hidden, x.weight, x.targets, x.bias, x.form)


class Compiled(PerToken):
    """Plain PyTorch, compiled for every shape anew."""

    name = "torch.compile"
    rounds_logits = True
    needs_cuda = True  # a CPU's compiler would take longer than the smoke test

    @functools.cached_property
    def per_token(self) -> Callable[..., Tensor]:
        return torch.compile(full_logits, dynamic=False)


class Trl(PerToken):
    """TRL's chunked log-probs, in tiles of 32768 vocabulary entries."""

    name = "trl"
    module = "trl.kernels"
    install = "trl"
    passes = {"trained": 5, "frozen": 4}
    rounds_logits = True
    takes = EVERY_FORM

    def rows_at_once(self) -> int | None:
        from trl.kernels import chunked_logprob

        return getattr(chunked_logprob, "TOKEN_CHUNK_SIZE", None)

    def per_token_of(self, x: Inputs) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        of_head = (x.form.softcap, x.form.logit_scale)
        temperature, outputs = 1.0, ()
        operands = (x.hidden, x.weight, x.bias, x.targets)
        arguments = (*operands, temperature, TRL_CHUNK, *of_head, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0]


class Cce(PerToken):
    """Cut cross-entropy."""

    name = "cce"
    module = "cut_cross_entropy"
    install = "cut-cross-entropy"
    needs_cuda = True
    passes = {"trained": 5, "frozen": 4}
    rounds_logits = True  # the target's, whose products are rounded one by one
    takes = frozenset({"softcap"})

    def per_token_of(self, x: Inputs) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        options = {"softcap": x.form.softcap, "reduction": "none"}
        return -linear_cross_entropy(x.hidden, x.weight, x.targets, **options)


class Liger(Contender):
    """Liger's fused linear DPO loss."""

    name = "liger"
    module = "liger_kernel.chunked_loss"
    install = "liger-kernel"
    rounds_logits = True
    pairs_only = True
    takes = frozenset({"bias"})

    def _apply(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Return (loss, [S] sums of log-probs).

        Liger wants [2 B, T, D], all chosen responses before all rejected responses.
        """
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        def stacked(rows: Tensor) -> Tensor:
            pairs = rows.view(-1, 2, x.lengths[0], *rows.shape[1:])
            return pairs.transpose(0, 1).flatten(0, 1)

        head = LigerFusedLinearDPOLoss(beta=BETA, compiled=x.device.type == "cuda")
        hidden, targets, ref_hidden = map(stacked, (x.hidden, x.targets, x.ref_hidden))
        reference = {"ref_input": ref_hidden, "ref_weight": x.ref_weight, "ref_bias": x.ref_bias}
        loss, (chosen, rejected, *_) = head(x.weight, hidden, targets, bias=x.bias, **reference)
        return loss, torch.stack((chosen, rejected), 1).flatten()

    def loss(self, x: Inputs) -> Tensor:
        return self._apply(x)[0]

    def sums(self, x: Inputs) -> Tensor:
        return self._apply(x)[1].detach()


def of_the_head(
    workspace_mb: float | None, engine: str = "auto", names: Sequence[str] | None = None
) -> list[Contender]:
    """Return the contenders of `una-fast bench`: una_fast, then eager and the peers.

    workspace_mb, engine: of una_fast
    names: beginnings of the names of the contenders; default: all
    """
    found = [Una(workspace_mb, engine), Eager(), Trl(), Liger(), Cce()]
    return [c for c in found if names is None or c.name.startswith(tuple(names))]


def lacks(function: Callable[..., Any], positional: int, *named: str) -> str | None:
    """Return what a peer's function no longer takes, or None.

    function: of another version than the version that this bench was written for, perhaps
    positional: number of arguments that are passed by position
    named: arguments that are passed by name
    """
    try:
        call = inspect.signature(function)
        call.bind(*[None] * positional, **dict.fromkeys(named))
    except (TypeError, ValueError) as error:
        name = getattr(function, "__qualname__", repr(function))
        return f"{name} has another signature in this version: {error}"
    return None


def step(contender: Contender, x: Inputs) -> Tensor:
    """Run forward and backward, and return the loss."""
    x.clear()
    loss = contender.loss(x)
    loss.backward()
    return loss.detach()
