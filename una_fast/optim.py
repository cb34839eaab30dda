"""Optimizers whose state fits, and that lose no update to the rounding of narrow weights.

    bytes of state per trained weight     device    host
    adamw, fp32 weights                        8       0    two moments; torch's own AdamW
    adamw, bf16 weights                        8       0    two moments in fp32; weights rounded stochastically
    adamw, offload_optimizer                   0      12    fp32 weight (the master) and two moments
    adamw_8bit                              2.03       0    two moments in 8 bits with a scale per 256; torchao's
    sgd                                        0       0

bf16 keeps 8 bits of a weight: rounded to the nearest, an update below 1/512 of it is lost, step after step. Rounded
up or down at random, with probabilities by the distance, it is right in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.optim.adamw import adamw

from una_fast.counters import memory_category

if TYPE_CHECKING:
    from una_fast.config import RunConfig
    from una_fast.model.policy import Policy

SLICE = 2**24
"""Numbers updated at a time: what bounds every temporary of a step."""


# --- which optimizer -------------------------------------------------------------------------------------------------


def make_optimizer(policy: Policy, config: RunConfig) -> Optimizer:
    """Over the trainable parameters; norms and biases are not decayed.

    Raises ValueError for adamw_8bit without torchao, and for sgd on weights that would lose its updates.
    """
    parameters = policy.trainable_parameters()
    narrow = any(p.dtype != torch.float32 for p in parameters)
    if config.optimizer == "sgd":
        if narrow:
            raise ValueError(
                "optimizer=sgd would lose small updates to the rounding of bf16 weights; set master_weights=true, "
                "precision=fp32, or optimizer=adamw"
            )
        return SGD(parameters, lr=config.learning_rate)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.learning_rate, "betas": tuple(config.adam_betas)}
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(groups, **options)
    if narrow or config.offload_optimizer:
        return AdamW(groups, **options, on_host=config.offload_optimizer)
    return torch.optim.AdamW(groups, **options, fused=any(p.is_cuda for p in parameters) or None)


def _adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Optimizer:
    """torchao's AdamW with 8-bit moments. Its first step compiles one function per shape of a parameter."""
    try:
        import torchao.optim
    except ImportError as error:
        raise ValueError(
            "optimizer=adamw_8bit needs torchao: pip install una-fast[optim]"
        ) from error

    class AdamW8bit(_OwnState, torchao.optim.AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            # torchao makes moments in the dtype of the weights. Those of small parameters are not in 8 bits: in bf16,
            # 0.999 v would round to v. And its 8-bit DTensors compile only if they pass for fp32.
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32), signed)

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            # torchao wants the rate as a tensor, for as a number it is compiled in; schedules and checkpoints want a
            # number.
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate)
            loss = super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            return loss

    optimizer = AdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


class _OwnState(Optimizer):
    """Loads its state as it is; torch would cast it to the dtype and device of the weights."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][number])


# --- AdamW -----------------------------------------------------------------------------------------------------------


class AdamW(_OwnState):
    """AdamW whose arithmetic and state are fp32 whatever the dtype of the weights, and may live in host memory.

    Each parameter has the state `step`, `exp_avg` and `exp_avg_sq`, beside it on its device; its bf16 weights are
    rounded stochastically, with noise from torch's generator of that device. on_host: the state is on the CPU, with an
    fp32 `master` of the weights, and the step runs there; gradients go over in slices, and the masters come back,
    rounded to the nearest, for what is rounded off is not lost to the master. No temporary is larger than a slice
    (SLICE numbers) of a parameter. Works on DTensors (FSDP2), whose state is sharded as they are.

    The state is plain memory, not pinned: only gradients and weights cross the bus, through buffers that are.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        on_host: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.on_host = on_host
        self._bus: _Bus | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            piece
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
            for piece in self._slices(p, group)
        ]
        if self.on_host and self._bus is None and work and work[0].weight.is_cuda:
            self._bus = _Bus(work[0].weight.device)
        if self._bus is not None and work:
            self._step_over_bus(work, self._bus)
        elif self.on_host:
            for piece in work:
                piece.update(piece.master, piece.grad)
                piece.weight.copy_(piece.master)
        else:
            for piece in work:
                piece.update_in_place()
        return loss

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made at its first step."""
        state = self.state[p]
        if not state:
            place = torch.device("cpu") if self.on_host else p.device
            with memory_category("host" if self.on_host else "optimizer"):
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, dtype=torch.float32, device=place)
                if self.on_host:  # widened there: no fp32 copy beside the weights
                    state["master"] = p.detach().to(place).to(torch.float32, copy=True)
        return state

    def _slices(self, p: Tensor, group: dict[str, Any]) -> list[_Part]:
        """The slices of a parameter and its state; the step is counted here."""
        state = self._state(p)
        step = state["step"].clone()
        state["step"] += 1
        weights, grads = _flat(p), _local(p.grad).reshape(-1)
        masters = _flat(state["master"]) if self.on_host else weights
        moments = (_flat(state["exp_avg"]), _flat(state["exp_avg_sq"]))
        return [
            _Part(*(x[i : i + SLICE] for x in (weights, grads, masters, *moments)), step, group)
            for i in range(0, weights.numel(), SLICE)
        ]

    def _step_over_bus(self, work: list[_Part], bus: _Bus) -> None:
        """The gradient of slice k + 1 and the weights of slice k - 1 travel while the CPU updates slice k."""
        bus.begin()
        grad, arrived = bus.fetch(0, work[0].grad)
        for k, piece in enumerate(work):
            following = bus.fetch(k + 1, work[k + 1].grad) if k + 1 < len(work) else None
            # The stream works in order: once gradient k is here, the weights of slice k - 2 have left their buffer.
            arrived.synchronize()
            piece.update(piece.master, grad)
            bus.send(k, piece.master, piece.weight)
            if following is not None:
                grad, arrived = following
        bus.end()


@dataclass(frozen=True)
class _Part:
    """A flat slice [n] of a parameter with its state. step: [], of the whole parameter, before this update."""

    weight: Tensor
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    group: dict[str, Any]

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """Moments, and [n] fp32 weights in place, by a gradient of any dtype where the state is."""
        adamw(
            [weight],
            [grad.float()],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step.clone()],  # which is counted up
            fused=True,
            amsgrad=False,
            beta1=self.group["betas"][0],
            beta2=self.group["betas"][1],
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            maximize=False,
        )

    def update_in_place(self) -> None:
        """Moments and weights; the weights are rounded stochastically where they are narrower than fp32."""
        if self.weight.dtype == torch.float32:
            self.update(self.weight, self.grad)
            return
        weight = self.weight.float()
        self.update(weight, self.grad)
        self.weight.copy_(stochastic_bf16_(weight))


def stochastic_bf16_(values: Tensor) -> Tensor:
    """Round fp32 numbers in place to ones that bf16 holds: up or down in magnitude, right in the mean. Infinities and
    NaNs stay. Draws from torch's generator of the device; returns its argument."""
    assert values.dtype == torch.float32
    # bf16 is the upper half of fp32: a random lower half carries into it as often as the lower half is large.
    bits = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device)
    bits.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
    return torch.where(values.isfinite(), bits.view(torch.float32), values, out=values)


class _Bus:
    """Carries slices between a CUDA device and pinned buffers, two for each way, on a stream of its own."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def begin(self) -> None:
        """Nothing is carried before the gradients are there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def fetch(self, k: int, grad: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """(where slice number k of the gradients will be, the event that it is there)."""
        buffer = self._buffer("fetch", k, grad)
        return buffer, self._copy(buffer, grad)

    def send(self, k: int, master: Tensor, weight: Tensor) -> None:
        """Round slice number k to the dtype of the weights, and begin to copy it there."""
        buffer = self._buffer("send", k, weight)
        buffer.copy_(master)
        self._copy(weight, buffer)

    def end(self) -> None:
        """Nothing uses the weights before they are there."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _buffer(self, way: str, k: int, like: Tensor) -> Tensor:
        key, n = (way, k % 2, like.dtype), like.numel()
        if key not in self.buffers or self.buffers[key].numel() < n:
            self.buffers[key] = torch.empty(n, dtype=like.dtype, pin_memory=self.pinned)
        return self.buffers[key][:n]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _flat(tensor: Tensor) -> Tensor:
    """[n] view of the numbers that this process holds."""
    return _local(tensor).view(-1)


# --- about gradients and memory --------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The fp32 norm, [], of all gradients together; a DTensor where they are. torch's get_total_norm would round the
    norm of bf16 gradients to bf16."""
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def state_bytes(parameters: Iterable[Tensor], config: RunConfig) -> tuple[int, int]:
    """(bytes on the device, bytes on the host) of the optimizer's state for these trained parameters, masters and
    pinned buffers included. Of DTensors the local shard counts."""
    locals_ = [_local(p) for p in parameters]
    total = sum(p.numel() for p in locals_)
    if config.optimizer == "sgd":
        return 0, 0
    if config.optimizer == "adamw_8bit":
        # torchao leaves what is small, or not made of whole blocks of 256, in fp32; a block has an fp32 scale, and each
        # moment a table of its 256 values.
        coded = [p.numel() for p in locals_ if p.numel() >= 4096 and p.numel() % 256 == 0]
        return 2 * sum(n + n // 64 + 1024 for n in coded) + 8 * (total - sum(coded)), 0
    if config.offload_optimizer:
        # an fp32 gradient; two buffers for gradients and two for weights, per dtype
        largest = {
            p.dtype: min(max(q.numel() for q in locals_ if q.dtype == p.dtype), SLICE)
            for p in locals_
        }
        buffers = sum(4 * dtype.itemsize * n for dtype, n in largest.items())
        return 0, 12 * total + 4 * max(largest.values(), default=0) + buffers
    return 8 * total, 0


def step_bytes(parameters: Iterable[Tensor], config: RunConfig) -> int:
    """Bytes of the largest temporaries of a step on the device, beside state and gradients. What torchao's compiled
    step needs is not known; one fp32 copy of the largest parameter is assumed."""
    locals_ = [_local(p) for p in parameters]
    largest = max((p.numel() for p in locals_), default=0)
    if config.optimizer == "sgd" or config.offload_optimizer:
        return 0
    if config.optimizer == "adamw_8bit":
        return 4 * largest
    # Of a slice of narrow weights: fp32 weights, noise, magnitudes, and three masks to find what is finite.
    narrow = max((p.numel() for p in locals_ if p.dtype != torch.float32), default=0)
    return 15 * min(narrow, SLICE)
