"""The branches of CUDA without a GPU: head, optimizers, and the steps of a run (fake_cuda.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runs
from head_calls import CALLS, GPU_DIM, GPU_SIZE
from helpers import evaluate
from runs import LORA, open_trainer
from tiny import make_config, make_records, write_jsonl
from una_fast import gather_logps, linear_una_loss, optim, token_logps
from una_fast.attention import varlen
from una_fast.attention.packed import fresh_tables
from una_fast.head import constants, engines
from una_fast.model import activations
from una_fast.train import build

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor
from una_fast.kernels import adamw, gather, gemm, logp_partials, one_read, rowgrad, scale, una_loss

from fake_cuda import CUDA, Launch, Recorded, fake_cuda
from una_fast.head import triton_engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has a device")
KERNELS = (adamw, gather, gemm, logp_partials, one_read, rowgrad, scale, una_loss)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}
VOCAB = 5003  # odd: padding alone aligns the rows of logits


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """Record the work of a test on the device; nothing kept for the device outlives the test."""
    kept = (
        constants.constant,
        triton_engine._unit_table,
        engines._no_triton,
        varlen.varlen_kernel,
    )
    with fresh_tables(), fake_cuda() as record:
        for function in kept:
            function.cache_clear()
        yield record
    for function in kept:
        function.cache_clear()


@pytest.fixture(scope="module")
def variants() -> list[Any]:
    """Return the launches that bench/kernels_compile.py compiles for an H200."""
    assert KERNELS, "imported for the interpreter, before the table imports them"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")  # the table removes the variable
        import kernels_compile as table
    return [
        *table.row_variants(),
        *table.gather_variants(),
        *table.scale_variants(),
        *table.adamw_variants(),
        *table.linear_variants("sm_90"),
        *table.gemm_variants(),
        *table.loss_variants(),
    ]


def types_of(launch: Launch) -> dict[str, str]:
    """Return the Triton types of the pointers and tensor descriptors of a launch."""
    types = {}
    for name, x in launch.arguments.items():
        if isinstance(x, Tensor):
            types[name] = f"*{NAMES[x.dtype]}"
        elif isinstance(x, TensorDescriptor):
            block = ",".join(map(str, x.block_shape))
            types[name] = f"tensordesc<{NAMES[x.base.dtype]}[{block}]>"
    return types


def is_compiled_as(launch: Launch, variant: Any) -> bool:
    """Return whether a launch has the types, the flags and the sizes of tiles of a variant."""
    if launch.kernel != variant.kernel.__name__:
        return False
    types = {k: v for k, v in variant.types.items() if v.startswith(("*", "tensordesc"))}
    constants = (variant.constants, variant.constants | variant.unaligned)
    fits = any(chosen.items() <= launch.arguments.items() for chosen in constants)
    return fits and types == types_of(launch)


def assert_compiled(recorded: Recorded, variants: list[Any]) -> None:
    """Assert that every launch is among the compiled ones."""
    for launch in recorded.launches:
        found = any(is_compiled_as(launch, variant) for variant in variants)
        assert found, f"{launch.kernel} is not compiled for {types_of(launch)}, {launch.arguments}"


def assert_no_waits(recorded: Recorded, *by_design: str) -> None:
    """Assert that the host waits for the device by design alone, and copies without waiting."""
    assert recorded.waits == list(by_design)
    blocking = [copy for copy in recorded.copies if copy.blocking]
    assert not blocking


def assert_aligned(recorded: Recorded) -> None:
    """Assert that the rows of every matrix of a product lie together, from 16 bytes to 16 bytes."""
    assert recorded.products
    for place, operands in recorded.products:
        for x in operands:
            if min(x.shape) == 1:  # a vector
                continue
            row, start = max(x.stride()) * x.itemsize, x.storage_offset() * x.itemsize
            aligned = min(x.stride()) == 1 and row % 16 == start % 16 == 0
            assert aligned, (place, x, x.stride(), x.storage_offset())


# ---- head ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_head(name, engine, dtype, recorded, variants):
    p, arguments = CALLS[name].drawn(GPU_SIZE, GPU_DIM, VOCAB, device=CUDA, dtype=dtype)
    recorded.products.clear()  # of the problem
    units = torch.tensor(7)  # on the host, as any caller has it
    out = evaluate(linear_una_loss, p, **arguments, engine=engine, num_units=units)
    for leaf in arguments["train"]:
        grad, x = out[f"grad {leaf}"], getattr(p, leaf)
        assert (grad.shape, grad.dtype, grad.device) == (x.shape, dtype, CUDA)
    with torch.no_grad():  # and a reference that shares the head
        own = {"ref_hidden": p.ref_hidden, "workspace_mb": arguments["workspace_mb"]}
        call = (p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback)
        linear_una_loss(*call, **own, engine=engine)
    assert bool(recorded.launches) == (engine == "triton")
    assert_no_waits(recorded)
    assert_compiled(recorded, variants)
    if engine == "triton":
        assert_aligned(recorded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_of_any_loss(dtype, recorded, variants):
    p, _ = CALLS["bias and softcap"].drawn(1, GPU_DIM, VOCAB, device=CUDA, dtype=dtype)
    recorded.products.clear()  # of the problem
    leaves = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    token_logps(leaves[0], leaves[1], p.targets, leaves[2], softcap=30.0).sum().backward()
    assert [x.grad.dtype for x in leaves] == 3 * [dtype]
    assert_aligned(recorded)
    logits = torch.empty(2, 9, VOCAB, dtype=dtype, device=CUDA, requires_grad=True)
    targets = torch.zeros(2, 8, dtype=torch.int64, device=CUDA)
    gather_logps(logits[:, :-1], targets, 1.7).sum().backward()
    assert logits.grad.shape == logits.shape and logits.grad.dtype == dtype
    names = {launch.kernel for launch in recorded.launches}
    assert names >= {"rows_kernel", "gather_kernel", "gather_backward_kernel"}
    assert_no_waits(recorded)
    assert_compiled(recorded, variants)


# ---- optimizers ----


def on_device(dtype: torch.dtype) -> list[nn.Parameter]:
    """Return a matrix of more than one slice, and a vector, with gradients."""
    found = []
    for shape in ((70, 128), (128,)):
        p = nn.Parameter(torch.empty(shape, dtype=dtype, device=CUDA))
        p.grad = torch.empty_like(p)
        found.append(p)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_on_the_device(dtype, recorded, variants, monkeypatch):
    monkeypatch.setattr(optim, "SLICE", 8192)
    params = on_device(dtype)
    optimizer = optim.AdamW(params, lr=1e-3)
    for _ in range(2):
        optimizer.step()
    kernels = [launch.kernel for launch in recorded.launches]
    slices = 3  # two of the matrix
    assert kernels == (2 * slices * ["adamw_kernel"] if dtype == torch.bfloat16 else [])
    state = [x for p in params for x in optimizer.state[p].values()]
    assert all(x.device == CUDA and x.dtype == torch.float32 for x in state)
    assert not recorded.copies
    assert_no_waits(recorded)
    assert_compiled(recorded, variants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_on_the_host_waits_for_each_slice_alone(dtype, recorded, monkeypatch):
    monkeypatch.setattr(optim, "SLICE", 8192)
    params = on_device(dtype)
    optimizer = optim.AdamW(params, lr=1e-3, on_host=True)
    optimizer.step()  # makes the state, and waits for the weights
    recorded.waits.clear()
    recorded.copies.clear()
    optimizer.step()
    state = [x for p in params for x in optimizer.state[p].values()]
    assert all(x.device.type == "cpu" for x in state)
    assert len(recorded.copies) == 6, "gradients to the host, weights back"
    assert_no_waits(recorded, *3 * ["optim.py:_step_over_bus"])


# ---- steps of a run ----

NORM = "distributed.py:local_scalar"  # the norm of the gradient: whether to step at all
MASK = "head_forward.py:backbone_output"  # transformers looks for padding, once a forward
SLICE = "optim.py:_step_over_bus"  # a slice of the gradient that arrives on the host
CHECKPOINTS = {"gradient_checkpointing": True, "mlp_tile": 16}
RUNS = {
    "packed": ({}, [NORM]),
    "padded": ({"packing": False}, [*4 * [MASK], NORM]),
    "masters": ({"master_weights": True}, [NORM]),
    "adapter": ({"lora": LORA, **CHECKPOINTS}, [NORM]),
    "activations on the host": ({"offload_activations": True, **CHECKPOINTS}, [NORM]),
    "optimizer on the host": ({"offload_optimizer": True}, [NORM, *21 * [SLICE]]),
    "plain gradient": ({"optimizer": "sgd", "master_weights": True}, [NORM]),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_wait_by_design_alone(name, recorded, variants, llamas, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SMALL", 1)
    monkeypatch.setattr(varlen, "varlen_fault", lambda kernel, device: None)  # compares numbers
    # Models are loaded, and probed, by numbers and through meta tensors.
    for module, loader in ((runs, "open_run"), (build, "load_trained"), (build, "load_frozen")):
        monkeypatch.setattr(module, loader, recorded.without(getattr(module, loader)))
    changes, waits = RUNS[name]
    records = make_records("mixed", 12)
    data = write_jsonl(tmp_path / "data.jsonl", records[:8])  # two steps
    held_out = write_jsonl(tmp_path / "held_out.jsonl", records[8:])  # two micro-batches
    settings = {"device": "cuda", "batch_size": 4, "micro_batch_size": 2, "workspace_mb": 1}
    settings["eval_data"] = [held_out]
    config = make_config(llamas["untied"], [data], tmp_path / "run", **settings | changes)
    trainer = open_trainer(config)
    steps = trainer.source.steps(0, trainer.total_steps)
    trainer.take_step(next(steps))  # makes the state of the optimizer, and waits for the weights
    recorded.waits.clear()
    recorded.copies.clear()
    taken = trainer.take_step(next(steps))
    assert_no_waits(recorded, *waits)
    assert_compiled(recorded, variants)
    offloaded = [copy for copy in recorded.copies if copy.place == "activations.py:_park"]
    assert bool(offloaded) == config.offload_activations
    trainer.log(2, taken)
    trainer.evaluate(2)
    assert set(recorded.waits[len(waits) :]) == {MASK} & set(waits)
    assert [x.place for x in recorded.copies if x.blocking] == 2 * ["metrics.py:take"]
