"""On a CUDA device:
the fused head in bf16 and fp16, and packed rows through the variable-length attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from embedded import eager_logps, make_batch
from head_calls import (
    CALLS,
    GPU_DIM,
    GPU_SIZE,
    Step,
    check_capture,
    check_repeats,
    check_under,
    drawn,
)
from helpers import MIXED, MIXED_LENGTHS, PAIR, Problem, cast, problem, relative_error
from una_fast import (
    Feedback,
    Objective,
    gather_logps,
    linear_una_loss,
    token_logps,
)
from una_fast.attention import rows, sdpa, varlen
from una_fast.attention.packed import packed_attention
from una_fast.attention.rows import Segment
from una_fast.head import eager
from una_fast.head.ops import sequence_logps
from una_fast.head.torch_engine import GPU_BLOCK_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
MIB = 2**20


def on_device(p: Problem, dtype: torch.dtype) -> Problem:
    moved = cast(p, dtype)
    for name in ("hidden", "weight", "bias", "targets", "ref_hidden", "ref_weight"):
        setattr(moved, name, getattr(moved, name).to(DEVICE))
    return moved


def gradients(op, p: Problem, *, bias: bool = True, **options) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call; cu_seqlens and feedback stay on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    ref = {} if "ref_logps" in options else {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
    out = op(
        *leaves[:2],
        p.targets,
        p.cu_seqlens,
        p.feedback,
        bias=leaves[2] if bias else None,
        **ref,
        **options,
    )
    out.loss.backward()
    grads = {"hidden": leaves[0].grad, "weight": leaves[1].grad} | (
        {"bias": leaves[2].grad} if bias else {}
    )
    return {"logps": out.logps, "loss": out.loss.detach(), **grads}


def sized(
    rows: int, dim: int, vocab: int, dtype: torch.dtype = torch.bfloat16, peak: float = 24.0
) -> Problem:
    """A pair of rows / 2 tokens each, made on the device."""
    lengths = [rows - rows // 2, rows // 2] if rows > 1 else [rows] * min(rows, 1)
    feedback = (
        PAIR if len(lengths) == 2 else Feedback.scores(range(len(lengths)), [0.7] * len(lengths))
    )
    return drawn(lengths, dim, vocab, feedback, device=DEVICE, dtype=dtype, peak=peak)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize("workspace_mb", [1, 8, 512])
@pytest.mark.parametrize("vocab", [4001, 4096])
def test_no_worse_than_eager(workspace_mb, vocab, engine, dtype):
    """Against float64 on the same rounded inputs:
    vocabulary slices, streamed and resident blocks.
    """
    p = problem(0, longest=700, dim=256, vocab=vocab, peak=24.0, dtype=dtype)
    exact = gradients(eager.linear_una_loss, cast(p, torch.float64))
    on_gpu = on_device(p, dtype)
    ours = gradients(linear_una_loss, on_gpu, workspace_mb=workspace_mb, engine=engine)
    theirs = gradients(eager.linear_una_loss, on_gpu)
    for name in exact:
        error, allowed = (relative_error(x[name].cpu(), exact[name]) for x in (ours, theirs))
        assert error <= allowed + 1e-9, (name, error, allowed)


@pytest.mark.parametrize(
    "options", [{"softcap": 30.0, "logit_scale": 0.7}, {"temperature": 0.6}], ids=str
)
def test_logit_transforms(options):
    p = problem(1, longest=90, dim=64, vocab=1999, peak=20.0, dtype=torch.bfloat16)
    exact = gradients(eager.linear_una_loss, cast(p, torch.float64), **options)
    ours = gradients(linear_una_loss, on_device(p, torch.bfloat16), **options)
    for name in exact:
        assert relative_error(ours[name].cpu(), exact[name]) < 1e-2, name
    # ex2.approx and div.full of a GPU err by 2^-22, which a softcap carries into every logit.
    assert relative_error(ours["logps"].cpu(), exact["logps"]) < 2e-5


def test_mixed_feedback_and_losses_equal_the_torch_engine():
    p = on_device(
        problem(2, lengths=MIXED_LENGTHS, dim=64, vocab=999, feedback=MIXED), torch.bfloat16
    )
    options = {
        "objective": Objective(offset=0.1, length_normalize=True),
        "num_units": torch.tensor(7, device=DEVICE),
    }
    runs = {
        e: gradients(linear_una_loss, p, engine=e, workspace_mb=0.2, **options)
        for e in ("triton", "torch")
    }
    for name, value in runs["torch"].items():
        assert relative_error(runs["triton"][name], value) < 1e-2, name
    torch.testing.assert_close(runs["triton"]["loss"], runs["torch"]["loss"], rtol=1e-5, atol=1e-7)


def test_sum_over_8192_tokens_of_peaked_logits():
    """At |z| = 24, logits rounded to bf16 are 5 nat off over such a response.

    Ours: the products' own error, which is a small bias if tensor cores round their sums towards
    zero; policy minus reference, scored alike, has next to none.
    """
    p = sized(8192, 1024, 32768, peak=24.0)
    cu = torch.tensor([0, 8192])
    both = (p.hidden, p.weight), (p.ref_hidden, p.ref_weight)
    exact = []
    for hidden, weight in both:
        logps = torch.log_softmax(hidden.double() @ weight.double().T, 1)
        exact.append(logps.gather(1, p.targets.unsqueeze(1)).sum().item())
        del logps
    for options in ({"engine": "triton"}, {"engine": "torch"}, {"workspace_mb": 0.1}):
        found = [
            sequence_logps(hidden, weight, p.targets, cu, **options).item()
            for hidden, weight in both
        ]
        errors = [a - b for a, b in zip(found, exact, strict=True)]
        print(
            options,
            "error of the sum",
            errors[0],
            "of policy minus reference",
            errors[0] - errors[1],
        )
        assert abs(errors[0]) <= 0.5 and abs(errors[0] - errors[1]) <= 0.02


@pytest.mark.parametrize(
    ("rows", "dim", "vocab"), [(300, 576, 5003), (1, 128, 262145), (517, 1152, 32768)]
)
def test_fused_linear_kernel_in_bf16(rows, dim, vocab):
    from una_fast.kernels.logp_partials import linear_logps

    p = sized(rows, dim, vocab)
    z = p.hidden.double() @ p.weight.double().T
    lse, target = linear_logps(p.hidden, p.weight, p.targets)
    torch.testing.assert_close(lse.double(), torch.logsumexp(z, 1), rtol=0, atol=2e-4)
    torch.testing.assert_close(
        target.double(), z.gather(1, p.targets.unsqueeze(1)).squeeze(1), rtol=0, atol=2e-4
    )


# --- shapes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dim", "vocab", "workspace_mb"),
    [
        (0, 64, 1000, None),
        (1, 64, 1000, None),
        (1, 64, 262145, None),
        (130, 64, 262145, 8),
        (70_000, 64, 1024, None),  # more rows in one launch than a grid's second dimension holds
        (17_000, 64, 131_072, 10_000),  # offsets beyond 2^31 in one buffer of logits
    ],
)
def test_extreme_shapes(rows, dim, vocab, workspace_mb):
    p = sized(rows, dim, vocab)
    ref = torch.zeros(len(p.cu_seqlens) - 1, dtype=torch.float64, device=DEVICE)
    # Linear: a coefficient that no reward saturates.
    options = {
        "bias": False,
        "ref_logps": ref,
        "objective": Objective(pair="linear", score="reward_mse"),
    }
    found = gradients(linear_una_loss, p, workspace_mb=workspace_mb, **options)
    if rows:
        other = gradients(linear_una_loss, p, workspace_mb=64, engine="torch", **options)
        assert relative_error(found["logps"], other["logps"]) < 1e-6
        for name in ("hidden", "weight"):
            assert relative_error(found[name], other[name]) < 2e-2, name
    else:
        assert found["loss"].item() == 0 and not found["weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_gather_logps_beyond_32_bits(dtype, inplace):
    rows, vocab = (16_500 if dtype == torch.bfloat16 else 16_390), 131_072
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    targets[5] = -100
    last = logits[-3:].detach().double().requires_grad_()
    expected = torch.log_softmax(last / 0.7, 1).gather(1, targets[-3:].unsqueeze(1)).squeeze(1)
    upstream = torch.randn(rows, device=DEVICE)
    (exact,) = torch.autograd.grad(expected, last, upstream[-3:].double())
    given = logits.view_as(logits)
    out = gather_logps(given, targets, 0.7, inplace_backward=inplace)
    torch.testing.assert_close(out[-3:].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[5] == 0
    (grad,) = torch.autograd.grad(out, given, upstream)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace
    assert relative_error(grad[-3:], exact) < 1e-2 and not grad[5].any()


@pytest.mark.parametrize("layout", ["columns", "every other row", "transposed weight", "padded"])
def test_layouts(layout):
    p = sized(300, 128, 4003)
    expected = gradients(linear_una_loss, p, bias=False)
    hidden, weight = p.hidden, p.weight
    if layout == "columns":
        hidden = torch.cat([hidden, hidden], 1)[:, :128]
    elif layout == "every other row":
        hidden = hidden.repeat_interleave(2, 0)[::2]
    elif layout == "transposed weight":
        weight = weight.T.contiguous().T
    else:
        hidden = torch.nn.functional.pad(hidden, (0, 3))[:, :128]  # rows off 16-byte boundaries
    for workspace_mb in (None, 1):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
        out = linear_una_loss(
            *leaves, p.targets, p.cu_seqlens, p.feedback, workspace_mb=workspace_mb, **ref
        )
        out.loss.backward()
        assert relative_error(out.logps, expected["logps"]) < 1e-6
        assert relative_error(leaves[0].grad, expected["hidden"]) < 2e-2
        assert relative_error(leaves[1].grad, expected["weight"]) < 2e-2


def test_token_logps_with_any_upstream():
    p = sized(2000, 256, 20_011)
    p.targets[7] = -100
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    upstream = torch.randn(2000, device=DEVICE)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    token_logps(*leaves, p.targets).backward(upstream)
    eager.token_logps(*exact_leaves, p.targets).backward(upstream.double())
    for ours, exact in zip(leaves, exact_leaves, strict=True):
        assert relative_error(ours.grad, exact.grad) < 1e-2


@pytest.mark.parametrize("target", [4003, -1, -100])
@pytest.mark.parametrize("workspace_mb", [None, 1])
def test_a_target_outside_the_vocabulary_is_nan(target, workspace_mb):
    """Asking the GPU for an error message would wait for it: the loss says it instead."""
    p = sized(300, 128, 4003)
    p.targets[5] = target
    out = linear_una_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.cu_seqlens,
        p.feedback,
        ref_hidden=p.ref_hidden,
        workspace_mb=workspace_mb,
    )
    assert out.loss.isnan() and out.logps[0].isnan() and out.logps[1].isfinite()


# --- repeats, sync, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_bitwise_repeats(name):
    """A gradient written over logits that another thread has yet to read would differ at times."""
    check_repeats(
        *CALLS[name].drawn(GPU_SIZE, GPU_DIM, 50_257, device=DEVICE, dtype=torch.bfloat16),
        times=100,
    )


@contextmanager
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_no_sync_after_validation(name, engine):
    p, arguments = CALLS[name].drawn(GPU_SIZE, GPU_DIM, 5003, device=DEVICE, dtype=torch.bfloat16)
    check_under(no_sync, p, {**arguments, "engine": engine})


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize(("rows", "workspace_mb"), [(16_384, 256), (131_072, 256), (65_536, 48)])
def test_workspace_bounds_the_peak(rows, workspace_mb, engine, trained):
    vocab, dim = 32_768, 256
    p = sized(rows, dim, vocab)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_(trained)
    ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
    for _ in range(2):  # the first call also loads cuBLAS and its workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        options = {"workspace_mb": workspace_mb, "engine": engine}
        linear_una_loss(
            hidden, weight, p.targets, p.cu_seqlens, p.feedback, **ref, **options
        ).loss.backward()
        returned = hidden.grad.nbytes + (weight.grad.nbytes + 4 * vocab * dim if trained else 0)
        extra = torch.cuda.max_memory_allocated() - before - returned
    slack = 64 * rows  # log-probs, logsumexps, coefficients, targets
    slack += 2 * GPU_BLOCK_BYTES if engine == "torch" else 0  # its row operations make temporaries
    assert extra <= 1.05 * workspace_mb * MIB + slack


# --- integration ----------------------------------------------------------------------------------


def captured(step: Step) -> tuple[Callable[[], None], list[torch.Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(name):
    """Captured once for fixed cu_seqlens and feedback, replayed on other values."""
    check_capture(
        captured, *CALLS[name].drawn(GPU_SIZE, GPU_DIM, 10_007, device=DEVICE, dtype=torch.bfloat16)
    )


def test_a_first_call_inside_a_capture_is_refused():
    p = sized(64, 64, 1003)
    p.cu_seqlens = torch.tensor([0, 11, 64])  # lengths that no other test has
    ref = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    with (
        pytest.raises(RuntimeError, match="before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, ref_logps=ref)
    torch.cuda.synchronize()


def test_compiled_model_and_autocast():
    torch.manual_seed(0)
    p = sized(200, 64, 3001, dtype=torch.float32)
    layer = torch.nn.Linear(64, 64, device=DEVICE)
    ref = sequence_logps(torch.tanh(layer(p.hidden)) * 5, p.weight, p.targets, p.cu_seqlens)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(layer(x)) * 5
        return linear_una_loss(
            hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, ref_logps=ref
        ).loss

    with torch.autocast("cuda", torch.bfloat16):
        expected = torch.autograd.grad(loss_of(p.hidden), layer.weight)[0]
        found = torch.autograd.grad(torch.compile(loss_of)(p.hidden), layer.weight)[0]
    assert expected.dtype == torch.float32 and relative_error(found, expected) < 5e-2


def test_gradient_accumulation():
    p = sized(900, 64, 3001)
    halves = [slice(0, 450), slice(450, 900)]
    pairs = [Feedback.pairs([0], [1])] * 2
    leaves = [
        p.hidden.detach().clone().requires_grad_(),
        p.weight.detach().clone().requires_grad_(),
    ]
    lengths = torch.tensor([0, 225, 450])
    total = gradients(
        linear_una_loss,
        Problem(p.hidden, p.weight, p.bias, p.targets, torch.tensor([0, 225, 450, 675, 900]),
                Feedback.pairs([0, 2], [1, 3]), p.ref_hidden, p.ref_weight),
        bias=False,
    )  # fmt: skip
    for half, feedback in zip(halves, pairs, strict=True):
        linear_una_loss(
            leaves[0][half], leaves[1], p.targets[half], lengths, feedback,
            ref_hidden=p.ref_hidden[half], ref_weight=p.ref_weight, num_units=2,
        ).loss.backward()  # fmt: skip
    assert relative_error(leaves[0].grad, total["hidden"]) < 1e-2
    assert relative_error(leaves[1].grad, total["weight"]) < 2e-2


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 64])
def test_packed_rows_equal_separate_sequences(window):
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    if window:
        from transformers import MistralConfig, MistralForCausalLM

        config = MistralConfig(
            **{**config.to_dict(), "sliding_window": window, "model_type": "mistral"}
        )
        model = MistralForCausalLM(config)
    else:
        model = LlamaForCausalLM(config)
    model = model.cuda().bfloat16().eval()
    prompt, responses = (
        torch.randint(128, (300,)),
        [torch.randint(128, (n,)) for n in (120, 77, 200)],
    )
    bounds = torch.tensor([300, 120, 77, 200]).cumsum(0).tolist()
    segments = (Segment((0, 300), tuple(zip(bounds[:-1], bounds[1:], strict=True))),)
    ids = torch.cat([prompt, *responses])[None].cuda()
    positions = torch.cat([torch.arange(300), *(300 + torch.arange(len(r)) for r in responses)])[
        None
    ].cuda()
    weights = [torch.randn(len(r), 128, device=DEVICE, dtype=torch.bfloat16) for r in responses]
    with packed_attention(model):
        packed = model.model(ids, position_ids=positions, use_cache=False, una_segments=segments)[
            0
        ][0]
    rows = [packed[start:stop] for start, stop in segments[0].responses]
    ours = torch.autograd.grad(
        sum((h * w).sum() for h, w in zip(rows, weights, strict=True)), model.model.parameters()
    )
    alone = [
        model.model(torch.cat([prompt, response])[None].cuda(), use_cache=False)[0][0, 300:]
        for response in responses
    ]
    truth = torch.autograd.grad(
        sum((h * w).sum() for h, w in zip(alone, weights, strict=True)), model.model.parameters()
    )
    for a, b in [*zip(rows, alone, strict=True), *zip(ours, truth, strict=True)]:
        assert relative_error(a.float(), b.float()) < 5e-2


def row_of(*shapes: tuple[int, tuple[int, ...]]) -> tuple[rows.RowLayout, int]:
    segments, start = [], 0
    for prompt, responses in shapes:
        bounds = [start, start + prompt]
        for response in responses:
            bounds.append(bounds[-1] + response)
        segments.append(
            Segment((bounds[0], bounds[1]), tuple(zip(bounds[1:-1], bounds[2:], strict=True)))
        )
        start = bounds[-1]
    return rows.row_layout(tuple(segments), start), start


def kernel_named(name: str) -> varlen.VarlenKernel:
    kernel = {"flash-attn": varlen.flash_attn_kernel, "torch": varlen.torch_kernel}[name]()
    if kernel is None and name == "flash-attn":
        pytest.skip("flash_attn is not importable")
    assert kernel is not None
    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 2, 64, 500, 10_000])
@pytest.mark.parametrize(("heads", "dim"), [((8, 2), 128), ((4, 4), 64), ((6, 1), 256)])
@pytest.mark.parametrize(
    ("name", "softcap"), [("flash-attn", None), ("flash-attn", 3.0), ("torch", None)]
)
def test_varlen_kernels_equal_the_sdpa_path(name, softcap, heads, dim, window, dtype):
    """Forward and gradient of the kernel that is really there, against the path that the CPU tests
    show to be right.
    """
    kernel = kernel_named(name)
    row, total = row_of((700, (130, 257, 64)), (90, (33,)), (5, (300, 1)))
    scores = sdpa.ScoreRule(2 * dim**-0.5, window, softcap, None)
    inputs = [
        torch.randn(1, n, total, dim, device=DEVICE, dtype=dtype)
        for n in (heads[0], heads[1], heads[1])
    ]
    upstream = torch.randn(1, total, heads[0], dim, device=DEVICE, dtype=dtype)
    results = []
    for half in (True, False):
        qkv = [(x if half else x.float()).clone().requires_grad_() for x in inputs]
        out = (
            varlen.attend_varlen(*qkv, row, scores, kernel.call)
            if half
            else sdpa.attend_sdpa(*qkv, row, scores)
        )
        results.append((out, *torch.autograd.grad(out, qkv, upstream.to(out.dtype))))
    for what, ours, truth in zip("oqkv", *results, strict=True):
        assert relative_error(ours.float(), truth) < 2e-2, what


@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_the_kernel_passes_its_check(name):
    assert varlen.varlen_fault(kernel_named(name), DEVICE) is None
    assert varlen.varlen_kernel(DEVICE) is not None


def test_memory_of_a_prompt_that_four_responses_share():
    """Three copies of the keys and values are kept, and backward's workspace is that of one
    response: about 6 copies in all. The row in one kernel call would need about 25.
    """
    prompt, heads, kv_heads, dim = 65_536, 8, 2, 128
    copy = 2 * prompt * kv_heads * dim * 2
    peaks = []
    kernel = varlen.varlen_kernel(DEVICE)
    for responses in [(256,), (64,) * 4]:
        row, total = row_of((prompt, responses))
        qkv = [
            torch.randn(1, n, total, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        ]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores = sdpa.ScoreRule(dim**-0.5, None, None, None)
        varlen.attend_varlen(*qkv, row, scores, kernel.call).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del qkv
    print(
        "MiB for one and for four responses",
        *(peak // MIB for peak in peaks),
        "one copy",
        copy // MIB,
    )
    assert peaks[1] - peaks[0] <= 10 * copy


# ---- models of other trainers ----


def test_a_patched_model_gives_the_numbers_of_its_logits():
    """Packed by the attention kernel of the device, in bf16: no further from float32 than eager."""
    from una_fast.integrations.hf import patch_model

    config = LlamaConfig(
        vocab_size=4001,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    exact = LlamaForCausalLM(config).to(DEVICE)
    rounded = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    truth, eager_bf16 = eager_logps(exact, batch), eager_logps(rounded, batch)
    patch_model(rounded, pack=True)
    found = rounded(**batch, una="tokens", stats=("entropy", "is_top1"))
    assert (found.logps - truth).norm() <= 1.5 * (eager_bf16 - truth).norm()
    feedback = Feedback.merge([Feedback.pairs([0], [1]), Feedback.scores([2, 3], [0.9, 0.1])])
    reference = (truth.double().sum(1) - 1).detach()
    loss = rounded(**batch, feedback=feedback, ref_logps=reference).loss
    (loss + found.entropy.sum() + found.logps.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in rounded.parameters())
    assert loss.is_cuda and loss.dtype == torch.float64
