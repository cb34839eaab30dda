"""AdamW: torch's numbers, unbiased rounding, state on device or host, bounded temporaries."""

from __future__ import annotations

import functools
import io
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import una_fast.optim as optim_module
from una_fast.config import RunConfig
from una_fast.counters import LiveBytes
from una_fast.optim import (
    AdamW,
    gradient_norm,
    make_optimizer,
    state_bytes,
    step_bytes,
    stochastic_bf16_,
)

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99)}


def config(**settings) -> RunConfig:
    return RunConfig(model="m", data="d", output_dir="o", **settings)


def policy_of(*parameters: nn.Parameter) -> SimpleNamespace:
    return SimpleNamespace(trainable_parameters=lambda: list(parameters))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return a matrix that slices of 1000 cut raggedly, and a vector."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(37, 101, generator=generator).to(dtype)
    vector = torch.randn(53, generator=generator).to(dtype)
    return [nn.Parameter(matrix), nn.Parameter(vector)]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:], "weight_decay": 0.0},
    ]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).mul_(10.0**-step).to(p.dtype)
        optimizer.step()


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(optim_module, "SLICE", 1000)


# ---- numbers ----


@pytest.mark.parametrize("on_host", [False, True])
def test_fp32_weights_are_those_of_torch(small_slices, on_host):
    fused, plain, ours = parameters(), parameters(), parameters()
    take_steps(torch.optim.AdamW(groups(fused), **SETTINGS, fused=True), fused, range(20))
    take_steps(torch.optim.AdamW(groups(plain), **SETTINGS, foreach=False), plain, range(20))
    take_steps(AdamW(groups(ours), **SETTINGS, on_host=on_host), ours, range(20))
    assert all(torch.equal(a, b) for a, b in zip(ours, fused, strict=True))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_masters_on_the_host_are_fp32_training(small_slices):
    """bf16 weights are the rounded masters; the masters train as fp32 weights do."""
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.float()) for p in parameters(torch.bfloat16)]
    ours = AdamW(groups(narrow), **SETTINGS, on_host=True)
    theirs = torch.optim.AdamW(groups(wide), **SETTINGS)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(narrow, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.state[p]["master"], q.data, rtol=1e-6, atol=1e-7)
        assert torch.equal(p, ours.state[p]["master"].bfloat16())


def test_updates_below_the_rounding_of_bf16_are_right_in_the_mean():
    """Weights in [1, 2) have a spacing of 1/128; ten updates of 1e-5 are 1/39 of half of it."""
    torch.manual_seed(0)
    n, lr, steps = 200_000, 1e-5, 10
    weight = nn.Parameter(1 + torch.rand(n).bfloat16().float().mul_(0.9).bfloat16())
    before = weight.detach().double()
    wide = nn.Parameter(weight.detach().float())
    nearest = weight.detach().clone()
    ours, theirs = AdamW([weight], lr=lr), torch.optim.AdamW([wide], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.randn(n).add_(0.5).bfloat16()
        wide.grad = weight.grad.float()
        at = wide.detach().clone()
        ours.step()
        theirs.step()
        nearest = (nearest.float() + (wide.detach() - at)).bfloat16()
    assert torch.equal(nearest.double(), before), "rounded to the nearest, nothing moves"
    error = weight.detach().double() - wide.detach().double()
    moved = float((wide.detach().double() - before).mean())
    standard_error = float(error.std()) / n**0.5
    assert abs(moved) > 8 * standard_error, "the test can see the update"
    assert abs(float(error.mean())) < 4 * standard_error
    assert 0 < (weight.detach().double() != before).double().mean() < 0.1


@pytest.mark.parametrize("value", [1.0, 1.003, -3.3, 1e-40, -0.0, 3.3e38])
def test_stochastic_rounding_is_unbiased(value):
    torch.manual_seed(0)
    exact = torch.full((100_000,), value)
    rounded = stochastic_bf16_(exact.clone())
    assert torch.equal(rounded, rounded.bfloat16().float())
    below = exact[:1].abs().view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    assert float(rounded.abs().min()) <= abs(value)
    assert float(rounded.abs().max()) >= float(below)
    neighbours = 1 if value in (1.0, -0.0) else 2
    assert rounded.unique().numel() == neighbours, "to the two neighbours alone"
    error = rounded.double() - exact.double()
    assert abs(float(error.mean())) <= 4 * float(error.std()) / len(exact) ** 0.5


def test_infinities_and_nans_stay():
    bits = torch.tensor([0x7FC00001, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    nans = bits.view(torch.float32)
    for _ in range(100):  # noise in the lower half would turn some into 0, others into infinity
        assert stochastic_bf16_(nans.clone()).bfloat16().isnan().all()
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(stochastic_bf16_(infinite.clone()), infinite)


def test_noise_comes_from_the_generator_of_torch():
    def run(seed: int) -> torch.Tensor:
        params = parameters(torch.bfloat16)
        torch.manual_seed(seed)
        take_steps(AdamW(groups(params), **SETTINGS), params, range(3))
        return params[0].detach()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_gradient_norm_is_fp32():
    params = [*parameters(torch.bfloat16), *parameters()]
    for p in params:
        p.grad = torch.randn_like(p)
    norm = gradient_norm([*params, nn.Parameter(torch.zeros(3))])  # one without gradient
    assert norm.dtype == torch.float32
    expected = torch.cat([p.grad.double().flatten() for p in params]).norm()
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert gradient_norm([nn.Parameter(torch.zeros(3))]) == 0


class LateBus(optim_module._Bus):
    """A stream that copies as late as it may: for an event that is waited for, or at the end."""

    pinned = False

    def __init__(self) -> None:
        self.buffers = {}
        self.queue = []
        self.done = 0
        self.longest = 0

    def begin(self) -> None:
        assert self.done == len(self.queue)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> SimpleNamespace:
        self.queue.append((target, source))
        self.longest = max(self.longest, len(self.queue) - self.done)
        return SimpleNamespace(synchronize=functools.partial(self.run, len(self.queue)))

    def run(self, until: int) -> None:
        for target, source in self.queue[self.done : until]:
            target.copy_(source)
        self.done = max(self.done, until)

    def end(self) -> None:
        self.run(len(self.queue))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_slices_that_travel_late_are_not_mixed_up(small_slices, dtypes):
    """The way to a GPU and back: two buffers suffice however late their copies happen."""
    here = [nn.Parameter(p.to(dtype)) for p, dtype in zip(parameters(), dtypes, strict=True)]
    there = [nn.Parameter(p.detach().clone()) for p in here]
    take_steps(AdamW(groups(here), **SETTINGS, on_host=True), here, range(4))
    optimizer = AdamW(groups(there), **SETTINGS, on_host=True)
    bus = optimizer._bus = LateBus()
    take_steps(optimizer, there, range(4))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert bus.longest >= 3
    assert len(bus.queue) == 4 * 2 * 5, "five slices go over and back in a step"
    buffers = sum(buffer.nbytes for buffer in bus.buffers.values())
    assert buffers <= 1000 * 4 * sum(dtype.itemsize for dtype in set(dtypes))


# ---- state ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_loaded_state_goes_on_exactly(dtype, on_host):
    """torch's own load_state_dict would cast the state to the dtype of the weights."""
    whole, halves = parameters(dtype), parameters(dtype)
    torch.manual_seed(0)
    take_steps(AdamW(groups(whole), **SETTINGS, on_host=on_host), whole, range(6))
    torch.manual_seed(0)
    first = AdamW(groups(halves), **SETTINGS, on_host=on_host)
    take_steps(first, halves, range(3))
    second = AdamW(groups(halves), **{**SETTINGS, "lr": 1.0}, on_host=on_host)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert {value.dtype for value in second.state[halves[0]].values()} == {torch.float32}
    take_steps(second, halves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


@pytest.mark.parametrize("on_host", [False, True])
def test_where_the_state_of_weights_on_a_gpu_is(on_host):
    """Tensors without numbers stand for tensors of a GPU."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(40, 30, dtype=torch.bfloat16, device="cuda"))
        state = AdamW([weight], lr=1e-3, on_host=on_host)._state(weight)
    names = {"step", "exp_avg", "exp_avg_sq"}
    if on_host:
        names.add("master")
    assert set(state) == names
    place = "cpu" if on_host else "cuda"
    for value in state.values():
        assert value.device.type == place and value.dtype == torch.float32


class Temporaries(TorchDispatchMode):
    """The largest new tensor, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in self.tensors((args, kwargs))}
        for x in self.tensors(out):
            if x.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, x.numel())
        return out

    @staticmethod
    def tensors(tree):
        return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("on_host", [False, True])
def test_no_temporary_is_larger_than_a_slice(small_slices, on_host):
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, lr=1e-3, on_host=on_host)
    take_steps(optimizer, params, range(1))  # makes the state
    for p in params:
        p.grad = torch.ones_like(p)
    with Temporaries() as seen:
        optimizer.step()
    assert 0 < seen.largest <= 1000


def test_a_closure_is_called_with_gradients():
    matrix, _ = parameters()
    before = matrix.detach().clone()
    optimizer = AdamW([matrix], lr=1e-2)

    def closure() -> torch.Tensor:
        loss = matrix.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item(), rel=1e-6)
    assert not torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"offload_optimizer": True}, torch.bfloat16),
        ({"offload_optimizer": True}, torch.float32),
        ({"optimizer": "sgd"}, torch.float32),
    ],
)
def test_predicted_state_is_the_state(settings, dtype, monkeypatch):
    monkeypatch.setattr(optim_module, "SLICE", 64)
    params = parameters(dtype)
    optimizer = make_optimizer(policy_of(*params), config(**settings))
    take_steps(optimizer, params, range(1))
    held = 0
    for value in tree_leaves(list(optimizer.state.values())):
        if isinstance(value, torch.Tensor) and value.dim():
            held += value.nbytes
    on_device, on_host = held, 0
    if settings.get("offload_optimizer"):
        buffers = 64 * (4 + 4 * dtype.itemsize)
        on_device, on_host = 0, held + buffers
    assert state_bytes(params, config(**settings)) == (on_device, on_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_the_temporaries_that_are_predicted(dtype, monkeypatch):
    """Beside state and gradients; slices bound them."""
    monkeypatch.setattr(optim_module, "SLICE", 1000)
    params = [torch.nn.Parameter(torch.randn(70, 60).to(dtype))]
    optimizer = AdamW(params, lr=1e-3)
    take_steps(optimizer, params, range(1))  # makes the state
    params[0].grad = torch.randn_like(params[0])
    with LiveBytes() as live:
        optimizer.step()
    predicted = step_bytes(params, config(), "cpu")
    assert (predicted == 0) == (dtype == torch.float32)
    assert 0.6 * predicted <= live.peak() <= predicted + 100


# ---- which optimizer ----


def test_the_optimizer_of_each_setting():
    wide, narrow = policy_of(*parameters()), policy_of(*parameters(torch.bfloat16))
    assert type(make_optimizer(wide, config())) is torch.optim.AdamW
    assert type(make_optimizer(wide, config(optimizer="sgd"))) is torch.optim.SGD
    on_device = make_optimizer(narrow, config())
    assert type(on_device) is AdamW and not on_device.on_host
    for policy in (wide, narrow):
        assert make_optimizer(policy, config(offload_optimizer=True)).on_host
    settings = config(weight_decay=0.3, learning_rate=1e-4, adam_betas=(0.8, 0.95))
    matrices, vectors = make_optimizer(narrow, settings).param_groups
    assert (matrices["weight_decay"], matrices["params"][0].dim()) == (0.3, 2)
    assert (vectors["weight_decay"], vectors["params"][0].dim()) == (0.0, 1)
    for group in (matrices, vectors):
        assert (group["lr"], group["betas"]) == (1e-4, (0.8, 0.95))


def test_sgd_does_not_lose_updates_silently():
    message = "optimizer=sgd would lose small updates .*set master_weights=true"
    with pytest.raises(ValueError, match=message):
        make_optimizer(policy_of(*parameters(torch.bfloat16)), config(optimizer="sgd"))


def test_adamw_8bit_without_torchao_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    message = r"adamw_8bit needs torchao: pip install una-fast\[optim\]"
    with pytest.raises(ValueError, match=message):
        make_optimizer(policy_of(*parameters()), config(optimizer="adamw_8bit"))


def test_adamw_8bit(monkeypatch):
    """State, steps near the steps of 32-bit moments, and an exact resumption.

    torchao compiles the step; here traced as ever, but without a C++ compiler.
    """
    pytest.importorskip("torchao")
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)

    def made() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(64, 128).bfloat16()),
            nn.Parameter(torch.randn(64).bfloat16()),
        ]
        settings = config(optimizer="adamw_8bit", learning_rate=1e-2)
        return params, make_optimizer(policy_of(*params), settings)

    params, optimizer = made()
    take_steps(optimizer, params, range(2))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [1e-2, 1e-2], "numbers, for schedules and checkpoints"
    matrix, vector = (optimizer.state[p]["exp_avg_sq"] for p in params)
    assert matrix.codes.dtype == torch.uint8 and vector.dtype == torch.float32
    held = 2 * sum(x.nbytes for x in (matrix.codes, matrix.scale, matrix.qmap, vector))
    assert state_bytes(params, config(optimizer="adamw_8bit")) == (held, 0)

    start, exact = made()[0][0].detach().float(), made()[0]
    take_steps(AdamW(exact, lr=1e-2), exact, range(2))
    ours, theirs = params[0].detach().float(), exact[0].detach().float()
    assert (ours - theirs).abs().mean() < 0.3 * (theirs - start).abs().mean()

    saved, noise = io.BytesIO(), torch.get_rng_state()
    torch.save(optimizer.state_dict(), saved)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    take_steps(optimizer, params, range(2, 4))
    other = make_optimizer(policy_of(*copies), config(optimizer="adamw_8bit", learning_rate=1.0))
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert other.state[copies[1]]["exp_avg_sq"].dtype == torch.float32
    torch.set_rng_state(noise)
    take_steps(other, copies, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
