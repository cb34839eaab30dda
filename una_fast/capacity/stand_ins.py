"""What stands in for parts of a step when it is planned: they make the tensors that the real ones make, and no numbers.

The fused head reads the feedback, and its kernels write what they are given; an attention kernel of a GPU is not there.
Everything else of a planned step is the code of a real one (run_plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface

from una_fast.attention import packed, rows
from una_fast.config import RunConfig
from una_fast.counters import memory_category
from una_fast.data.batch import Batch
from una_fast.head.plan import (
    DEFAULT_WORKSPACE_MB,
    HeadSize,
    Tile,
    cost,
    forward_pass,
    forward_tile,
    head_size,
    make_plan,
)
from una_fast.head.torch_engine import CACHE_BLOCK_BYTES


class PlannedHead:
    """The fused head: its block plan as always, and the tensors that it allocates; no numbers."""

    def __init__(self, config: RunConfig, device: str, batch: Batch) -> None:
        self.device, self.feedback, self.normalize = device, batch.feedback, config.length_normalize
        self.lengths = batch.cu_seqlens.diff().tolist()
        megabytes = (
            DEFAULT_WORKSPACE_MB[device] if config.workspace_mb is None else config.workspace_mb
        )
        self.workspace = int(megabytes * 2**20)
        self.flop = 0.0

    def _size(self, weight: Tensor) -> tuple[HeadSize, int]:
        """Of this head, and the budget of its tiles."""
        size = head_size(*weight.shape, self.device, weight.itemsize)
        return size, self.workspace - (self.workspace // 8 if size.cast else 0)

    def _tensors(self, size: HeadSize, tile: Tile, gathered: bool) -> list[Tensor]:
        """Logits, copies of hidden rows, a slice of the weight where operands are cast, temporaries."""
        logits = tile.rows * size.stride(tile.vocab) * size.acc_bytes
        copies = tile.rows * size.copied_bytes(gathered, tile.vocab < size.vocab)
        cast = (
            min(self.workspace // 8, size.vocab * size.hidden * size.acc_bytes) if size.cast else 0
        )
        block = (
            min(CACHE_BLOCK_BYTES, logits) if self.device == "cpu" else 0
        )  # of the row operations
        return [torch.empty(n, dtype=torch.int8) for n in (logits, copies, cast, block)]

    def logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = _autocast_copy(weight)
        size, budget = self._size(weight)
        tile = forward_tile(size, len(hidden), budget)
        self.flop += forward_pass(size, len(hidden), tile).flop
        with memory_category("head"):
            self._tensors(size, tile, gathered=False)
        return hidden.new_zeros(())

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _PlannedLoss.apply(hidden, weight, bias, self)


class _PlannedLoss(torch.autograd.Function):
    """What passes.OnePass and head._LinearUna keep and make."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: PlannedHead
    ) -> Tensor:
        with memory_category("head"):
            operand = _autocast_copy(weight)
            size, budget = head._size(operand)
            trained = ctx.needs_input_grad[1]
            width = size.hidden if trained else 0
            with unset_fake_temporarily():  # it reads the feedback
                plan = make_plan(
                    head.feedback,
                    head.lengths,
                    size,
                    budget=budget,
                    accumulator_width=width,
                    length_normalize=head.normalize,
                )
            head.flop += cost(plan, head.lengths, size, width).flop
            workspace = head._tensors(size, plan.tile, gathered=len(head.lengths) > 2)  # noqa: F841
            scratch = [torch.empty(weight.shape, dtype=torch.float32) for _ in range(plan.scratch)]  # noqa: F841
            ctx.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            ctx.weight = torch.empty(weight.shape, dtype=torch.float32) if trained else None
        ctx.dtype, ctx.bias = weight.dtype, None if bias is None else torch.empty_like(bias)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with memory_category("head"):
            weight = None if ctx.weight is None else ctx.weight.to(ctx.dtype)
        hidden, ctx.hidden, ctx.weight = ctx.hidden, None, None
        return hidden, weight, ctx.bias, None


def _autocast_copy(weight: Tensor) -> Tensor:
    return (
        weight.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else weight
    )


class PlannedKernel:
    """Counts the flop of packed attention; called, it is a GPU's varlen kernel that makes tensors and no numbers."""

    def __init__(self) -> None:
        self.flop = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, scores: Any) -> Tensor:
        return _PlannedAttention.apply(q, k, v)

    def count(self, flop: float) -> None:
        self.flop += flop

    def packed(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **options: Any,
    ) -> Any:
        """packed_attention_forward, its parts and its flop counted."""
        pairs = rows.attended_pairs(options["una_segments"], options.get("sliding_window"))
        flop = 2.0 * pairs * query.shape[1] * (query.shape[-1] + value.shape[-1])
        self.count(flop)
        with memory_category("attention"):
            out, _ = packed.packed_attention_forward(module, query, key, value, *args, **options)
        if (
            out.requires_grad
        ):  # five products where forward has two; not called for what checkpointing runs again
            out.register_hook(lambda grad: self.count(2.5 * flop))
        return out, None


@contextmanager
def planned_attention(device: str, unpadded: bool) -> Iterator[PlannedKernel]:
    """Attention as a device of this kind runs it, on tensors without numbers: packed, and SDPA's of padded batches,
    which builds a mask only where something is hidden. transformers looks for that in the numbers."""
    kernel = PlannedKernel()
    masks = AttentionMaskInterface()
    sdpa = masks["sdpa"]

    def mask(*args: Any, **options: Any) -> Tensor | None:
        window = options.get("local_size")
        if unpadded and (window is None or options["kv_length"] < window):
            return None
        return sdpa(*args, **options)

    with packed.traced_attention(kernel if device == "cuda" else None):
        AttentionInterface.register(packed.PACKED, kernel.packed)
        AttentionMaskInterface.register("sdpa", mask)
        try:
            yield kernel
        finally:
            AttentionInterface.register(packed.PACKED, packed.packed_attention_forward)
            AttentionMaskInterface.register("sdpa", sdpa)


class _PlannedAttention(torch.autograd.Function):
    """[T, H, D] queries: saves them, keys, values, the output and a logsumexp per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        with memory_category("attention"):
            float_dq = torch.empty(q.shape, dtype=torch.float32)  # noqa: F841  the kernel's accumulator
            # Keys and values shared by a group of heads are expanded for their gradients, then summed over the group.
            group = q.shape[1] // k.shape[1]
            expanded = (
                [x.new_empty(x.shape[0], x.shape[1] * group, x.shape[2]) for x in (k, v)]
                if group > 1
                else []
            )  # noqa: F841
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
