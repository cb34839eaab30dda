"""Stand-ins for the fused head and a GPU's attention kernel in a planned step.

They make the tensors of the real ones, and no numbers: the fused head reads the feedback, its
kernels read numbers, and an attention kernel of a GPU is not there. The rest of a planned step is
the code of a real step (trace.py).
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
from una_fast.attention.varlen import VarlenKernel
from una_fast.config import RunConfig
from una_fast.counters import memory_category
from una_fast.data.batch import Batch
from una_fast.data.split import split_batch
from una_fast.group import ALONE, Group
from una_fast.head.plan import (
    HeadSize,
    Tile,
    cast_bytes,
    cost,
    forward_pass,
    forward_plan,
    head_size,
    kept_plan,
    make_plan,
    tile_budget,
)
from una_fast.head.torch_engine import CACHE_BLOCK_BYTES, leaf_bytes
from una_fast.head.vocabulary import ROW_BYTES, make_rounds


class PlannedHead:
    """Stand in for the fused head: the block plan and the tensors of a real one, no numbers.

    flop: work of all calls so far
    """

    def __init__(
        self,
        config: RunConfig,
        workspace: int,
        device: str,
        batch: Batch,
        group: Group = ALONE,
    ) -> None:
        """Prepare the calls of one batch.

        config: settings of the run
        workspace: bytes of the fused head
        device: "cpu" or "cuda"
        batch: with its feedback and lengths on the CPU
        group: ranks that split the tokens of the batch among themselves
        """
        self.device, self.workspace = device, workspace
        self.feedback, self.normalize = batch.feedback, config.length_normalize
        self.lengths = split_batch(batch, group).cu_seqlens.diff().tolist()
        self.whole_lengths = batch.cu_seqlens.diff().tolist() if group.size > 1 else None
        self.group = group
        self.flop = 0.0

    def size(self, weight: Tensor, leaf: torch.dtype | None = None) -> HeadSize:
        """Return the size of the head of a weight; leaf: dtype of the gradient, if any."""
        return head_size(*weight.shape, self.device, weight.itemsize, leaf_bytes(leaf))

    def budget(self, size: HeadSize) -> int:
        """Return the bytes for tiles."""
        return tile_budget(self.workspace, cast=size.cast)

    def allocate(
        self, size: HeadSize, tile: Tile, *, gathered: bool, trained: bool, forward: bool
    ) -> list[Tensor]:
        """Allocate the workspace of a pass: logits, copies of hidden rows, casts, temporaries.

        size: of the head
        tile: of the plan
        gathered: rows come from several places
        trained: hidden rows are copied, times their factors
        forward: some rows have log-probs without gradients, which need a block of temporaries
        """
        logits = tile.logit_bytes(size)
        copies = tile.rows * size.copied_bytes(gathered, tile.vocab < size.vocab, trained)
        cast = block = 0
        if size.cast:
            whole = size.vocab * size.hidden * size.acc_bytes
            cast = min(cast_bytes(self.workspace), whole)
        if self.device == "cpu" and forward:
            block = min(CACHE_BLOCK_BYTES, logits)  # of the row operations
        sizes = (logits, tile.gradient_bytes(size), copies, cast, block)
        return [torch.empty(n, dtype=torch.int8) for n in sizes]

    def logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for sequence_logps: a scalar without a number."""
        operand = _autocast_copy(weight)  # lives as long as the pass
        size = self.size(operand)
        plan = forward_plan(size, len(hidden), self.budget(size))
        self.flop += forward_pass(size, len(hidden), plan.tile).flop
        with memory_category("head"):
            self.allocate(size, plan.tile, gathered=False, trained=False, forward=True)
            self.sum_over_group()
        return hidden.new_zeros(())

    def sum_over_group(self) -> None:
        """Stand in for the sums of the responses, which cross the group once per call."""
        self.group.sum(torch.empty(len(self.lengths), dtype=torch.float64))

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for linear_una_loss: a scalar with a graph."""
        return _PlannedLoss.apply(hidden, weight, bias, self)


class _PlannedLoss(torch.autograd.Function):
    """The tensors that passes.OnePass makes, and ops._LinearUna keeps."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: PlannedHead
    ) -> Tensor:
        with memory_category("head"):
            operand = _autocast_copy(weight)  # lives as long as the pass
            trained = ctx.needs_input_grad[1]
            size = head.size(operand, weight.dtype if trained else None)
            width = size.hidden if trained else 0
            with unset_fake_temporarily():  # the plan reads the feedback
                plan = make_plan(
                    head.feedback,
                    head.lengths,
                    size,
                    budget=head.budget(size),
                    accumulator_width=width,
                    length_normalize=head.normalize,
                    whole_lengths=head.whole_lengths,
                )
            head.flop += cost(plan, head.lengths, size, width).flop
            live = head.allocate(
                size,
                plan.tile,
                gathered=plan.gathered,
                trained=trained,
                forward=bool(plan.recomputed or plan.unscored),
            )
            head.sum_over_group()
            live += [torch.empty(weight.shape, dtype=torch.float32) for _ in range(plan.scratch)]
            ctx.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            dtype = weight.dtype if plan.direct else torch.float32
            ctx.weight = torch.empty(weight.shape, dtype=dtype) if trained else None
            del live, operand  # freed once the gradients are there
        ctx.dtype = weight.dtype
        ctx.bias = None if bias is None else torch.empty_like(bias)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with memory_category("head"):
            weight = None if ctx.weight is None else ctx.weight.to(ctx.dtype)
        hidden, ctx.hidden, ctx.weight = ctx.hidden, None, None
        return hidden, weight, ctx.bias, None


class PlannedSplitHead(PlannedHead):
    """Stand in for a head whose vocabulary is split over ranks (head/vocabulary.py).

    Rows are gathered, and their gradients reduced, among the ranks that are not there.
    """

    def __init__(self, *given: Any, vocabulary: Group, rows: tuple[int, ...]) -> None:
        """Prepare the calls of one batch.

        given: as for PlannedHead
        vocabulary: ranks that share the head
        rows: scored rows of each of them
        """
        super().__init__(*given)
        self.vocabulary, self.rows = vocabulary, rows

    def logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for sequence_logps: a scalar without a number."""
        with memory_category("head"):
            self.score(hidden, weight, None)
            self.sum_over_group()
        return hidden.new_zeros(())

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for linear_una_loss: a scalar with a graph."""
        return _PlannedSplitLoss.apply(hidden, weight, bias, self)

    def score(
        self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make the tensors of a call; return gradients of hidden states and weight, if any.

        hidden: [N_r, D]
        weight: [V_r, D]
        needs: whether hidden and weight want a gradient; None: a pass without gradients
        """
        need_hidden, need_weight = needs or (False, False)
        self.vocabulary.gather(torch.empty(1, 6, dtype=torch.int64))  # sizes of all ranks
        operand = _autocast_copy(weight)
        size = self.size(operand, weight.dtype if need_weight else None)
        numbers = hidden.itemsize + (size.acc_bytes if any(needs or ()) else 0)
        row_bytes = size.hidden * numbers + ROW_BYTES
        budget = self.budget(size)
        rounds = make_rounds(self.rows, row_bytes, budget // 2)
        own = torch.empty_like(hidden) if need_hidden else None
        if not rounds:
            return own, torch.zeros_like(weight) if need_weight else None
        count = len(self.rows) * rounds[0].width
        budget = max(budget - count * row_bytes, budget // 2)
        tile = forward_plan(size, rounds[0].rows, budget).tile
        if needs is not None:
            tile = kept_plan(size, rounds[0].rows, budget, size.hidden * need_weight).tile
        options = {"gathered": False, "trained": need_weight, "forward": True}
        live = self.allocate(size, tile, **options)
        self.vocabulary.gather(torch.empty(max(self.rows), dtype=torch.int64))  # targets
        gathered = None
        for one in rounds:
            gathered = None
            gathered = self.vocabulary.gather(hidden.new_empty(one.width, size.hidden))
            self.vocabulary.largest(torch.empty(count, dtype=torch.float32))
            self.vocabulary.sum(torch.empty(2, count, dtype=torch.float64))
        again = sum(max(one.rows - tile.rows, 0) for one in rounds)
        passes = 1 + need_hidden + need_weight
        work = passes * sum(self.rows) + (again if needs is not None else 0)
        self.flop += 2.0 * work * size.hidden * size.vocab
        if needs is None:
            return None, None
        self.vocabulary.gather(torch.empty(max(self.rows), dtype=torch.float32))  # coefficients
        of_weight = None
        if need_weight:
            is_direct = len(rounds) == 1 and tile.rows >= rounds[0].rows
            dtype = weight.dtype if is_direct else torch.float32
            of_weight = torch.empty(weight.shape, dtype=dtype)
        for number, one in reversed(list(enumerate(rounds))):
            if number + 1 < len(rounds):
                gathered = self.vocabulary.gather(hidden.new_empty(one.width, size.hidden))
            if need_hidden:
                sums = torch.empty(gathered.shape, dtype=torch.float32)
                self.vocabulary.reduce_scatter(sums)
                del sums
            gathered = None
        del live
        return own, of_weight


class _PlannedSplitLoss(torch.autograd.Function):
    """The tensors that vocabulary.SplitPass makes, and ops._LinearUna keeps."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: PlannedSplitHead
    ) -> Tensor:
        with memory_category("head"):
            ctx.grads = head.score(hidden, weight, ctx.needs_input_grad[:2])
            head.sum_over_group()
        ctx.dtype, ctx.head = weight.dtype, head
        ctx.bias = None if bias is None else torch.empty_like(bias)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.grads
        ctx.grads = None
        with memory_category("head"):
            if weight is not None:
                ctx.head.vocabulary.gather(upstream.double().reshape(1))
                weight = weight.to(ctx.dtype)
        return hidden, weight, ctx.bias, None


def _autocast_copy(weight: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return weight
    return weight.to(torch.get_autocast_dtype("cpu"))


class PlannedKernel:
    """Packed attention of a planned device: makes tensors without numbers, and counts the flop."""

    def __init__(self, device: str) -> None:
        """Stand in for the varlen kernel of a GPU ("cuda"); a CPU ("cpu") runs SDPA."""
        self.flop = 0.0
        self._kernel = None
        if device == "cuda":
            self._kernel = VarlenKernel("planned", _planned_varlen, softcap=True)

    def packed(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Run packed_attention_forward; its memory and its flop are counted."""
        pairs = rows.attended_pairs(options["una_segments"], options.get("sliding_window"))
        group = options.get("una_context", ALONE)
        heads = query.shape[1] / group.size  # of a rank, over the whole row
        flop = 2.0 * pairs * heads * (query.shape[-1] + value.shape[-1])
        self._count(flop)
        with memory_category("attention"):
            out, _ = packed.packed_attention_forward(
                module, query, key, value, *args, kernel=self._kernel, **options
            )
        if out.requires_grad:
            # Five products where forward has two; not called for a pass that is repeated.
            out.register_hook(lambda grad: self._count(2.5 * flop))
        return out, None

    def _count(self, flop: float) -> None:
        self.flop += flop


@contextmanager
def planned_attention(device: str, unpadded: bool) -> Iterator[PlannedKernel]:
    """Run attention as a kind of device runs it, on tensors without numbers, inside the block.

    device: "cpu" or "cuda"
    unpadded: padded batches have no padding

    Packed rows go through the kernel that is yielded. SDPA of padded batches gets a mask only where
    something is hidden; transformers would look for padding in the numbers.
    """
    kernel = PlannedKernel(device)
    masks = AttentionMaskInterface()
    sdpa_mask = masks["sdpa"]

    def mask(*args: Any, **options: Any) -> Tensor | None:
        window = options.get("local_size")
        if unpadded and (window is None or options["kv_length"] < window):
            return None
        return sdpa_mask(*args, **options)

    with packed.fresh_tables():
        AttentionInterface.register(packed.PACKED, kernel.packed)
        AttentionMaskInterface.register("sdpa", mask)
        try:
            yield kernel
        finally:
            AttentionInterface.register(packed.PACKED, packed.packed_attention_forward)
            AttentionMaskInterface.register("sdpa", sdpa_mask)


def _planned_varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any, rule: Any) -> Tensor:
    return _PlannedAttention.apply(q, k, v)


class _PlannedAttention(torch.autograd.Function):
    """The tensors that a varlen kernel keeps and makes.

    Saved are queries [T, H, D], keys, values, the output, and a logsumexp per query and head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        with memory_category("attention"):
            accumulator = torch.empty(q.shape, dtype=torch.float32)  # noqa: F841  of dQ
            # Keys and values shared by a group of heads are expanded for their gradients, which
            # are then summed over the group.
            group = q.shape[1] // k.shape[1]
            expanded = []
            if group > 1:
                for x in (k, v):
                    expanded.append(x.new_empty(x.shape[0], x.shape[1] * group, x.shape[2]))
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
