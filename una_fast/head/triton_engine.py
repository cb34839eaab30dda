"""The fused head on the Triton kernels: cuBLAS for GEMMs, one launch per chunk for row operations.

A GEMM writes float32 logits u of some rows into the one buffer; a row kernel reads u once, and
writes the gradient but for one factor per row, in the dtype that GEMMs read, into a buffer for the
rows of a chunk; two GEMMs read that. Nothing else has V columns. The loss and the coefficients of
all responses are two launches. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from una_fast.head.constants import kept_on_device
from una_fast.head.plan import GPU_ALIGN, GPU_QUANTUM, HOPPER
from una_fast.head.row_stats import EntropyTerm, RowSums, needed_sums
from una_fast.head.segment_loss import Lengths, SegmentLoss
from una_fast.head.torch_engine import LogitTransform, TorchEngine, Vocab
from una_fast.kernels import (
    gather,
    gemm,
    logp_partials,
    one_read,
    row_stats,
    rowgrad,
    scale,
    una_loss,
)
from una_fast.losses import UnaOutput, denominator

COLUMNS = ("kind", "first", "second", "value", "margin", "weight", "offset")  # of Feedback


class TritonSegmentLoss(SegmentLoss):
    """The loss kernel where it has every form of the objective; else losses.py on the [S] sums."""

    @staticmethod
    def sums(lengths: Lengths, tokens: Tensor) -> Tensor:
        """Return the [S] float64 sums of [N] token log-probs, in one launch."""
        return una_loss.segment_sums(tokens, lengths.cu_tensor)

    def output(self, tokens: Tensor) -> UnaOutput:
        """Return the result of the call, in two launches."""
        if not self._has_kernel:
            return super().output(tokens)
        logps = self.whole_sums(tokens)
        out = self._losses(logps)
        return UnaOutput(out.loss, logps, self.ref_logps.clone(), out.rewards, out.unit_losses)

    def coefficients(self, tokens: Tensor) -> Tensor:
        """Return the [S] float64 gradients dL/dlogps, in two launches."""
        if not self._has_kernel:
            return super().coefficients(tokens)
        return self._losses(self.whole_sums(tokens)).coef

    @property
    def _forms(self) -> dict[str, str]:
        return {kind: getattr(self.objective, kind) for kind in una_loss.FORMS}

    @property
    def _has_kernel(self) -> bool:
        return all(form in una_loss.FORMS[kind] for kind, form in self._forms.items())

    def _losses(self, logps: Tensor) -> una_loss.UnaLosses:
        units = denominator(self.reduction, self.num_units, self.feedback.num_units)
        on_device = None
        number = 1.0
        # A denominator on the device is divided by there; reading it would wait.
        if isinstance(units, Tensor):
            on_device = units.to(logps.device, non_blocking=True)
        else:
            number = float(units)
        table = _unit_table(
            tuple(tuple(getattr(self.feedback, name).tolist()) for name in COLUMNS),
            self.lengths.whole,
            self.objective.beta,
            self.objective.offset,
            self.objective.length_normalize,
            number,
            logps.device,
        )
        return una_loss.una_losses(
            logps, self.ref_logps, table, **self._forms, denominator=on_device
        )


@kept_on_device
def _unit_table(
    feedback: tuple[tuple[float, ...], ...],
    lengths: tuple[int, ...],
    beta: float,
    constant: float,
    length_normalize: bool,
    units: float,
    device: torch.device,
) -> una_loss.UnitTable:
    """Build the kernel's table of units.

    feedback: COLUMNS of the feedback
    lengths: tokens per response
    beta, constant, length_normalize: of the objective
    units: denominator of the loss
    device: of the table
    """
    columns = [torch.tensor(values, dtype=torch.int64) for values in feedback[:3]]
    columns += [torch.tensor(values, dtype=torch.float64) for values in feedback[3:]]
    return una_loss.unit_table(
        *columns,
        torch.tensor(lengths, dtype=torch.int64),
        beta=beta,
        constant=constant,
        length_normalize=length_normalize,
        denominator=units,
        device=device,
    )


class TritonEngine(TorchEngine):
    """CUDA, and ROCm by construction; float32, bfloat16 and float16 operands."""

    name = "triton"
    segment_loss = TritonSegmentLoss
    align = GPU_ALIGN
    quantum = GPU_QUANTUM
    machine = HOPPER

    def _native(self) -> bool:
        return True

    def _mm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        # torch.mm has no out_dtype on ROCm.
        if torch.version.hip and out.dtype != a.dtype:
            gemm.mm(a, b, out, accumulate=accumulate)
        else:
            super()._mm(a, b, out, accumulate)

    def row_logps(self, u: Tensor, targets: Tensor, vocab: Vocab) -> tuple[Tensor, Tensor]:
        """Return ([C] logsumexp, [C] target logit) of a tile over a vocabulary range."""
        return rowgrad.row_logps(u, targets, **self._options(vocab))

    def row_grad_(
        self,
        u: Tensor,
        targets: Tensor,
        vocab: Vocab,
        coef: Tensor,
        lse: Tensor,
        out: Tensor | None = None,
        entropy: EntropyTerm | None = None,
    ) -> Tensor:
        """Return du of a tile over a vocabulary range: over u, or in out."""
        du = rowgrad.overlay(u, self.operand) if out is None else out
        rows = (u, targets, coef, lse)
        options = self._options(vocab)
        if entropy is None:
            rowgrad.row_grad(*rows, out=du, **options)
        else:
            row_stats.entropy_grad(*rows, out=du, **vars(entropy), **options)
        return du

    def row_sums(self, u: Tensor, targets: Tensor, vocab: Vocab, stats: Sequence[str]) -> RowSums:
        """Return the sums that statistics need, of a tile over a vocabulary range, in one read."""
        options = self._options(vocab)
        if options["bias"] is not None:
            options["bias"] = options["bias"].float()
        return RowSums(**row_stats.row_sums(u, targets, needed_sums(stats), **options))

    def one_read_(
        self, u: Tensor, targets: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ([C] log-probs, E [C, V], [C] factors) of a tile over all V, in one launch."""
        bias = self._bias_of((0, u.shape[1]))
        scores = rowgrad.overlay(u, self.operand) if out is None else out
        transform = vars(self.transform)
        logps, factors = one_read.one_read(u, targets, out=scores, bias=bias, **transform)
        return logps, scores, factors

    def linear_logps(
        self, hidden: Tensor, targets: Tensor, budget: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return ([C] logsumexp, [C] target logit) by the fused linear kernel.

        As many rows at a time as the partial sums of `budget` bytes allow. None for a weight with
        entries that do not lie together.
        """
        if self.weight.stride(1) != 1:
            return None
        bias = None if self.bias is None else self.bias.contiguous()
        step = max(budget // logp_partials.row_bytes(hidden.device, self.weight), 1)
        lse, target_logit = [], []
        for rows, labels in zip(hidden.split(step), targets.split(step), strict=True):
            stats = logp_partials.linear_logps(
                rows.contiguous(), self.weight, labels, bias=bias, **vars(self.transform)
            )
            lse.append(stats[0])
            target_logit.append(stats[1])
        return torch.cat(lse), torch.cat(target_logit)

    @staticmethod
    def gather(logits: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """Return ([M] log-probs, [M] logsumexp) of logits that the caller holds."""
        return gather.gather_logps(_rows(logits), targets, transform.temperature)

    @staticmethod
    def gather_grad(
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        upstream: Tensor,
        transform: LogitTransform,
        out: Tensor,
    ) -> None:
        """Write out = upstream * d logp / d logits; out may be the logits."""
        target = out if _rows(out) is out else None
        grad = gather.gather_logps_backward(
            _rows(logits), targets, lse, upstream, transform.temperature, out=target
        )
        if grad is not out:
            out.copy_(grad)

    @staticmethod
    def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
        """Return factor * grad in a dtype, in one launch; over grad where possible."""
        # A float64 bias beside narrower operands.
        if dtype not in scale.GRAD_DTYPES:
            return TorchEngine.scaled(grad, factor, dtype, keep)
        overwrite = grad.dtype == dtype and not keep
        out = grad if overwrite else torch.empty_like(grad, dtype=dtype)
        return scale.scale(grad, factor, out)

    def _options(self, vocab: Vocab) -> dict[str, Tensor | float | None]:
        return {"bias": self._bias_of(vocab), "start": vocab[0], **vars(self.transform)}

    def _bias_of(self, vocab: Vocab) -> Tensor | None:
        return None if self.bias is None else self.bias[slice(*vocab)].contiguous()


def _rows(logits: Tensor) -> Tensor:
    """Return logits that lie together along the vocabulary, as the row kernels read them."""
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits
    return logits.contiguous()
