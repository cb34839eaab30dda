"""Optimizers whose state fits, and that lose no update to the rounding of narrow weights.

    bytes of state per trained weight    device    host
    adamw, fp32 weights                       8       0    two moments; AdamW of torch
    adamw, bf16 weights                       8       0    two moments in fp32; weights rounded
                                                           stochastically
    adamw, offload_optimizer                  0      12    fp32 weight (the master), two moments
    adamw_8bit                             2.03       0    two moments in 8 bits with a scale per
                                                           256; AdamW8bit of torchao
    sgd                                       0       0

bf16 keeps 8 bits of a weight: rounded to the nearest, an update below 1/512 of the weight is lost,
step after step. Rounded up or down at random, with probabilities by the distance, the update is
right in the mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.optim.adamw import adamw

from una_fast.counters import memory_category
from una_fast.head.engines import triton_refusal
from una_fast.logs import say_once

if TYPE_CHECKING:
    from una_fast.config import RunConfig
    from una_fast.model.policy import Policy

logger = logging.getLogger(__name__)

SLICE = 2**24
"""Numbers updated at a time; the bound of every temporary of a step."""


# ---- which optimizer ----


def make_optimizer(policy: Policy, config: RunConfig) -> Optimizer:
    """Build the optimizer of a run over the trainable parameters; norms and biases are not decayed.

    ValueError for adamw_8bit without torchao, and for sgd on weights that would lose updates.
    """
    parameters = policy.trainable_parameters()
    narrow = any(p.dtype != torch.float32 for p in parameters)
    if config.optimizer == "sgd":
        if narrow:
            raise ValueError(
                "optimizer=sgd would lose small updates to the rounding of bf16 weights; "
                "set master_weights=true, precision=fp32, or optimizer=adamw"
            )
        return SGD(parameters, lr=config.learning_rate)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    options = {"lr": config.learning_rate, "betas": tuple(config.adam_betas)}
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(groups, **options)
    if narrow or config.offload_optimizer:
        return AdamW(groups, **options, on_host=config.offload_optimizer)
    # parallel.offload_parameters keeps the shards of a model on a GPU on the host.
    fused = any(_local(p).is_cuda for p in parameters) or None
    return torch.optim.AdamW(groups, **options, fused=fused)


def _adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Optimizer:
    """Build torchao's AdamW with 8-bit moments.

    The first step compiles a function for every shape of a parameter.
    """
    try:
        import torchao.optim
    except ImportError as error:
        raise ValueError(
            "optimizer=adamw_8bit needs torchao: pip install una-fast[optim]"
        ) from error

    class AdamW8bit(_OwnState, torchao.optim.AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            # torchao makes moments in the dtype of the weights. Moments of small parameters are not
            # in 8 bits: in bf16, 0.999 v would round to v. And 8-bit DTensors compile only as fp32.
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32), signed)

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            # torchao wants the rate as a tensor, because a number would be compiled in; schedules
            # and checkpoints want a number.
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
    """An optimizer that loads a state unchanged; torch would cast it as the weights."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        super().load_state_dict({**state_dict, "state": {}})
        saved, own = [], []
        for group in state_dict["param_groups"]:
            saved += group["params"]
        for group in self.param_groups:
            own += group["params"]
        for number, p in zip(saved, own, strict=True):
            if number in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][number])


# ---- AdamW ----


class AdamW(_OwnState):
    """AdamW with arithmetic and state in fp32 for weights of any dtype; state on device or host.

    Each parameter has the state `step`, `exp_avg` and `exp_avg_sq` on its device; bf16 weights are
    rounded stochastically, with noise from torch's generator of the device: on CUDA the generator
    seeds the noise of a step in a Triton kernel, elsewhere noise is drawn number by number. No
    temporary is larger than a slice (SLICE numbers) of a parameter. Works on DTensors (FSDP2): the
    state is sharded as the weights are.

    on_host: the state is on the CPU, with an fp32 `master` of the weights, and the step runs there.
        Gradients go over in slices, and the masters are copied back rounded to nearest; the
        rounded-off part stays in the master. The state is plain memory, not pinned: gradients and
        weights cross the bus through pinned buffers.
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
        """Update every parameter that has a gradient; return the result of the closure, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slices = self._all_slices()
        if self.on_host and self._bus is None and slices and slices[0].weight.is_cuda:
            self._bus = _Bus(slices[0].weight.device)
        if self._bus is not None and slices:
            self._step_over_bus(slices, self._bus)
        elif self.on_host:
            for piece in slices:
                piece.update(piece.master, piece.grad)
                piece.weight.copy_(piece.master)
        else:
            self._step_on_device(slices)
        return loss

    def _step_on_device(self, slices: list[_Slice]) -> None:
        """Update slices in place, by the kernel where the slice and the device allow it."""
        seeds: dict[torch.device, Tensor] = {}
        for number, piece in enumerate(slices):
            device = piece.weight.device
            if not _has_kernel(device, piece.weight.dtype, piece.grad.dtype):
                piece.update_in_place()
                continue
            if device not in seeds:
                # On the device: no step waits, and a restored generator repeats the noise.
                seeds[device] = torch.randint(2**63 - 1, (1,), device=device)
            piece.update_by_kernel(seeds[device], number)

    def _all_slices(self) -> list[_Slice]:
        """Return the slices of all parameters that have a gradient."""
        found: list[_Slice] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    found += self._slices(p, group)
        return found

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter, made at the first step."""
        state = self.state[p]
        if state:
            return state
        place = torch.device("cpu") if self.on_host else p.device
        category = "host" if self.on_host else "optimizer"
        with memory_category(category):
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=torch.float32, device=place)
            if self.on_host:  # widened there: no fp32 copy beside the weights
                state["master"] = p.detach().to(place).to(torch.float32, copy=True)
        return state

    def _slices(self, p: Tensor, group: dict[str, Any]) -> list[_Slice]:
        """Return the slices of a parameter and of the state; count the step."""
        state = self._state(p)
        step = state["step"].clone()
        state["step"] += 1
        weight = _flat(p)
        columns = {
            "weight": weight,
            "grad": _local(p.grad).reshape(-1),
            "master": _flat(state["master"]) if self.on_host else weight,
            "exp_avg": _flat(state["exp_avg"]),
            "exp_avg_sq": _flat(state["exp_avg_sq"]),
        }
        found = []
        for first in range(0, weight.numel(), SLICE):
            tensors = {name: x[first : first + SLICE] for name, x in columns.items()}
            found.append(_Slice(**tensors, step=step, group=group))
        return found

    def _step_over_bus(self, slices: list[_Slice], bus: _Bus) -> None:
        """Update slice k while the gradient of k + 1 and the weights of k - 1 cross the bus."""
        bus.begin()
        grad, arrived = bus.fetch(0, slices[0].grad)
        for k, piece in enumerate(slices):
            following = None
            if k + 1 < len(slices):
                following = bus.fetch(k + 1, slices[k + 1].grad)
            # The stream works in order: once gradient k is here, the buffer of the weights of
            # slice k - 2 is free.
            arrived.synchronize()
            piece.update(piece.master, grad)
            bus.send(k, piece.master, piece.weight)
            if following is not None:
                grad, arrived = following
        bus.end()


@dataclass(frozen=True)
class _Slice:
    """A flat slice of a parameter, with the gradient and the state of the slice.

    weight: [n] in the dtype of the parameter
    grad: [n] in the dtype of the gradient
    master: [n] fp32 on the host; the weight itself without on_host
    exp_avg, exp_avg_sq: [n] fp32
    step: [] fp32, steps of the whole parameter before this update
    group: options of the parameter group
    """

    weight: Tensor
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    group: dict[str, Any]

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """Update moments and weights in place.

        weight: [n] fp32, on the device of the state
        grad: [n] any dtype, on the device of the state
        """
        adamw(
            [weight],
            [grad.float()],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step.clone()],  # adamw counts up in place
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
        """Update moments and weights; weights narrower than fp32 are rounded stochastically."""
        if self.weight.dtype == torch.float32:
            self.update(self.weight, self.grad)
            return
        weight = self.weight.float()
        self.update(weight, self.grad)
        self.weight.copy_(stochastic_bf16_(weight))

    def update_by_kernel(self, seed: Tensor, number: int) -> None:
        """Do what update_in_place does to bf16 weights, in one launch.

        seed: [1] int64, of the noise of this step
        number: of the slice among all slices of the step
        """
        from una_fast.kernels import adamw as kernel

        names = ("lr", "betas", "eps", "weight_decay")
        options = {name: self.group[name] for name in names}
        kernel.adamw(
            self.weight,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            seed,
            number,
            **options,
        )


def _has_kernel(device: torch.device, weight: torch.dtype, grad: torch.dtype) -> bool:
    """Return whether the Triton kernel can update weights; log once where Triton is missing.

    device: of weights, gradients and state
    weight, grad: dtypes of weights and gradients
    """
    kernel_dtypes = weight == torch.bfloat16 and grad in (torch.bfloat16, torch.float32)
    if device.type != "cuda" or not kernel_dtypes:
        return False
    reason = triton_refusal(device, weight)
    if reason is None:
        return True
    say_once(
        logging.WARNING,
        f"the Triton kernel of AdamW cannot run: {reason}; the steps on bf16 weights go through "
        "PyTorch, at about 5 times the memory traffic",
        logger,
    )
    return False


def stochastic_bf16_(values: Tensor) -> Tensor:
    """Round fp32 numbers in place to numbers of bf16, up or down in magnitude, right in the mean.

    Infinities and NaNs stay. Draws from torch's generator of the device. Returns `values`.
    """
    assert values.dtype == torch.float32
    # bf16 is the upper half of fp32: a random number added to the lower half carries into the upper
    # half with a probability in proportion to the lower half.
    bits = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device)
    bits.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
    return torch.where(values.isfinite(), bits.view(torch.float32), values, out=values)


class _Bus:
    """Slices on their way between a CUDA device and pinned buffers, two for each way.

    Copies run on a separate stream.
    """

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def begin(self) -> None:
        """Make the copies wait for the gradients."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def fetch(self, k: int, grad: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy slice k of the gradients; return (buffer, event of arrival)."""
        buffer = self._buffer("fetch", k, grad)
        return buffer, self._copy(buffer, grad)

    def send(self, k: int, master: Tensor, weight: Tensor) -> None:
        """Round slice k of the masters to the dtype of the weights, and begin to copy it there."""
        buffer = self._buffer("send", k, weight)
        buffer.copy_(master)
        self._copy(weight, buffer)

    def end(self) -> None:
        """Make users of the weights wait for the copies."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _buffer(self, way: str, k: int, like: Tensor) -> Tensor:
        key = (way, k % 2, like.dtype)
        n = like.numel()
        if key not in self.buffers or self.buffers[key].numel() < n:
            self.buffers[key] = torch.empty(n, dtype=like.dtype, pin_memory=self.pinned)
        return self.buffers[key][:n]


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.detach()


def _flat(tensor: Tensor) -> Tensor:
    """Return an [n] view of the shard that this process holds."""
    return _local(tensor).view(-1)


# ---- gradients and memory ----


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, [] fp32; a DTensor if the gradients are DTensors.

    torch's get_total_norm would round the norm of bf16 gradients to bf16.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def state_bytes(parameters: Iterable[Tensor], config: RunConfig) -> tuple[int, int]:
    """Return (bytes on the device, bytes on the host) of the optimizer's state.

    Masters and pinned buffers count. For DTensors the local shard counts.

    parameters: the trained parameters
    config: optimizer and offload_optimizer
    """
    shards = [_local(p) for p in parameters]
    total = sum(shard.numel() for shard in shards)
    if config.optimizer == "sgd":
        return 0, 0
    if config.optimizer == "adamw_8bit":
        return _bytes_of_8_bit_moments([shard.numel() for shard in shards]), 0
    if config.offload_optimizer:
        largest: dict[torch.dtype, int] = {}
        for shard in shards:
            numbers = min(shard.numel(), SLICE)
            largest[shard.dtype] = max(largest.get(shard.dtype, 0), numbers)
        fp32_gradient = 4 * max(largest.values(), default=0)
        # two buffers for gradients and two for weights, per dtype
        buffers = sum(4 * dtype.itemsize * numbers for dtype, numbers in largest.items())
        return 0, 12 * total + fp32_gradient + buffers
    return 8 * total, 0


def _bytes_of_8_bit_moments(sizes: list[int]) -> int:
    """Return the bytes of torchao's moments for parameters of these numbers of weights.

    Moments of small parameters, and of sizes that are no multiple of 256, stay in fp32. A block of
    256 has an fp32 scale, and each moment a table of 256 values.
    """
    coded = [size for size in sizes if size >= 4096 and size % 256 == 0]
    in_8_bits = 2 * sum(size + size // 64 + 1024 for size in coded)
    in_fp32 = 8 * (sum(sizes) - sum(coded))
    return in_8_bits + in_fp32


def step_bytes(parameters: Iterable[Tensor], config: RunConfig, device: str) -> int:
    """Return the bytes of the largest temporaries of a step on the device.

    State and gradients do not count. The need of torchao's compiled step is not known; an fp32 copy
    of the largest parameter is assumed.

    parameters: the trained parameters
    config: optimizer and offload_optimizer
    device: "cpu", or "cuda" for CUDA with the Triton kernels; present or not
    """
    shards = [_local(p) for p in parameters]
    largest = max((shard.numel() for shard in shards), default=0)
    if config.optimizer == "sgd" or config.offload_optimizer:
        return 0
    if config.optimizer == "adamw_8bit":
        return 4 * largest
    # of a slice of narrow weights: fp32 weights, noise, magnitudes, three masks of finite numbers
    without_slices = {torch.float32}
    # the kernel holds nothing but the seed
    if device == "cuda":
        without_slices.add(torch.bfloat16)
    narrow = [shard.numel() for shard in shards if shard.dtype not in without_slices]
    return 15 * min(max(narrow, default=0), SLICE)
