"""Reference log-probs: of a frozen model, of the policy with its adapter off, or cached numbers.

The reference is always from the start of the run: resuming from a checkpoint must not change the
objective, so the identity of the reference is saved with every checkpoint and compared.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from una_fast.data.batch import Batch
from una_fast.data.examples import Example
from una_fast.distributed import local_rows, reshard
from una_fast.model.policy import Policy
from una_fast.model.quantized import plain_parts
from una_fast.model.scoring import Scoring


class Reference(Protocol):
    """The source of reference log-probs.

    identity: the same text for the same reference, in any process
    """

    identity: str

    def logps(self, batch: Batch) -> Tensor:
        """Return the log-probs [S] float64 of a batch's responses."""
        ...


class FrozenReference:
    """A second model, which is never trained."""

    def __init__(self, policy: Policy, scoring: Scoring) -> None:
        """Keep a frozen policy in eval mode, and the scoring of the trained policy."""
        assert not policy.trainable_parameters(), "a reference that would be trained"
        assert not policy.model.training, "a reference in train mode"
        self.policy = policy
        self.scoring = scoring
        self.identity = "frozen:" + fingerprint(saved_tensors(policy.model))

    def logps(self, batch: Batch) -> Tensor:
        """Return the log-probs [S] float64 of a batch's responses."""
        return self.scoring.logps(self.policy, batch)

    @torch.no_grad()
    def refresh(self, policy: Policy) -> None:
        """Take over the weights of a policy of the same architecture, sharded alike."""
        reshard(policy.model, self.policy.model)
        theirs = dict(policy.model.named_parameters())
        for name, parameter in self.policy.model.named_parameters():
            parameter.copy_(theirs[name])


class AdapterReference:
    """The policy with its adapter switched off: no second copy of the weights."""

    def __init__(self, policy: Policy, scoring: Scoring) -> None:
        self.policy = policy
        self.scoring = scoring
        base = ((name, t) for name, t in saved_tensors(policy.model) if not t.requires_grad)
        self.identity = "adapter:" + fingerprint(base)

    def logps(self, batch: Batch) -> Tensor:
        """Return the log-probs [S] float64 of a batch's responses."""
        with self.policy.reference_mode():
            return self.scoring.logps(self.policy, batch)


class CachedReference:
    """The ref_logps column of the records."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Check that all records of a run bring ref_logps; ValueError by the record."""
        missing = [example.origin for example in examples if example.ref_logps is None]
        if missing:
            raise ValueError(
                f"reference=cached, but {missing[0]} has no ref_logps ({len(missing)} of "
                f"{len(examples)} records); write them with una-fast precompute-ref, or use "
                "reference=frozen"
            )
        values = list(chain.from_iterable(example.ref_logps for example in examples))
        digest = hashlib.sha256(struct.pack(f"{len(values)}d", *values)).hexdigest()
        self.identity = f"cached:{digest[:16]}"

    def logps(self, batch: Batch) -> Tensor:
        """Return the log-probs [S] float64 of a batch's responses."""
        if batch.ref_logps is None:
            assert not batch.targets.numel(), "examples without reference log-probs"
            return torch.zeros(0, dtype=torch.float64, device=batch.input_ids.device)
        return batch.ref_logps


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors that decide what a model computes: parameters, saved buffers.

    GPTQ and AWQ keep packed weights as buffers.
    """
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and all values: of every row, the sum of its bits.

    The sums are of whole numbers (modulo 2^64), the same in any order. Changes in a row that cancel
    each other are told apart by a sample of the values alone. Sharded tensors have the hash of
    whole tensors; all ranks must call then.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if isinstance(tensor, DTensor):
            digests = [_sharded_digest(tensor.detach())]
        else:
            digests = map(_digest, plain_parts(tensor.detach()))
        for sums, sample in digests:
            digest.update(sums.cpu().numpy().tobytes())
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of a plain tensor's rows, and the sample of its values."""
    bits = _bits(tensor)
    flat = bits.reshape(-1)
    return bits.sum(dim=1, dtype=torch.int64), flat[:: _stride(flat.numel())]


def _sharded_digest(tensor: DTensor) -> tuple[Tensor, Tensor]:
    """Return sums and sample of a sharded tensor, from the rows of every rank."""
    if tensor.dim() < 2:  # a single row, in pieces
        return _digest(tensor.full_tensor())
    local, first = local_rows(tensor)
    bits = _bits(local)
    mine = bits.sum(dim=1, dtype=torch.int64).view(len(local), math.prod(tensor.shape[1:-1]))
    whole = (tensor.shape[0], mine.shape[1])
    sums = DTensor.from_local(
        mine,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size(whole),
        stride=(whole[1], 1),
    ).full_tensor()
    # Every rank fills in a part of the sample.
    flat = bits.reshape(-1)
    in_row = math.prod(whole[1:]) * bits.shape[1]  # numbers of bits in a row of the tensor
    stride = _stride(whole[0] * in_row)
    lowest = torch.iinfo(bits.dtype).min
    sample = flat.new_full((-(-whole[0] * in_row // stride),), lowest)
    start = -(-first * in_row // stride)
    own = flat[start * stride - first * in_row :: stride]
    sample[start : start + len(own)] = own
    dist.all_reduce(sample, dist.ReduceOp.MAX)
    return sums.reshape(-1), sample


def _stride(numbers: int) -> int:
    """Return the distance of the values in a sample of about 64."""
    return max(numbers // 64, 1)


def _bits(tensor: Tensor) -> Tensor:
    """Return a plain tensor as a matrix of whole numbers: of 8 bytes, where its rows allow it."""
    tensor = tensor.contiguous()
    if tensor.storage_offset() * tensor.element_size() % 8:
        tensor = tensor.clone()  # at the start of memory of its own
    columns = tensor.shape[-1] if tensor.dim() else 1
    rows = tensor.reshape(-1, max(columns, 1))
    whole = columns * tensor.element_size() % 8 == 0
    return rows.view(torch.int64 if whole else torch.uint8)


def has_cached_logps(examples: Sequence[Example]) -> bool:
    """Return whether every record brings ref_logps; ValueError if only some do."""
    count = sum(example.ref_logps is not None for example in examples)
    if 0 < count < len(examples):
        without = next(example.origin for example in examples if example.ref_logps is None)
        raise ValueError(
            f"{without} has no ref_logps while {count} of {len(examples)} records have; complete "
            "them with una-fast precompute-ref, or set reference=frozen (or adapter) to compute "
            "all of them"
        )
    return bool(examples) and count == len(examples)


def without_cached_logps(examples: Sequence[Example]) -> list[Example]:
    """Return the same records, without their ref_logps."""
    return [replace(example, ref_logps=None) for example in examples]
