"""On a CUDA device: the fused head in bf16, and packed rows through the variable-length attention kernel."""

from __future__ import annotations

import pytest
import torch
from helpers import problem, relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from una_fast import Feedback, eager, linear_una_loss
from una_fast.attention import Segment, packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gradients(op, p, device, dtype, **options):
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (p.hidden, p.weight)]
    ref = {"ref_hidden": p.ref_hidden.to(device, dtype), "ref_weight": p.ref_weight.to(device, dtype)}
    out = op(*leaves, p.targets.to(device), p.cu_seqlens, p.feedback, **ref, **options)
    out.loss.backward()
    return {"logps": out.logps, "hidden": leaves[0].grad, "weight": leaves[1].grad}


@pytest.mark.parametrize("workspace_mb", [1, 8, 512])
@pytest.mark.parametrize("vocab", [4001, 4096])
def test_bf16_is_no_worse_than_eager(workspace_mb, vocab):
    p = problem(0, longest=700, dim=256, vocab=vocab, peak=24.0, dtype=torch.bfloat16)
    truth = gradients(eager.linear_una_loss, p, "cpu", torch.float64)
    ours = gradients(linear_una_loss, p, "cuda", torch.bfloat16, workspace_mb=workspace_mb)
    theirs = gradients(eager.linear_una_loss, p, "cuda", torch.bfloat16)
    for name in truth:
        error = relative_error(ours[name].cpu(), truth[name])
        assert error <= relative_error(theirs[name].cpu(), truth[name]) + 1e-9, name


def test_bitwise_repeat_and_no_sync_after_validation():
    p = problem(1, longest=900, dim=128, vocab=5003, dtype=torch.bfloat16, feedback=Feedback.pairs([0, 2], [1, 3]))
    hidden, weight = (x.cuda().requires_grad_() for x in (p.hidden, p.weight))
    targets, ref = p.targets.cuda(), torch.zeros(8, dtype=torch.float64, device="cuda")
    first = None
    for _ in range(3):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = linear_una_loss(hidden, weight, targets, p.cu_seqlens, p.feedback, ref_logps=ref, workspace_mb=8)
            out.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [out.loss.detach(), hidden.grad, weight.grad]
        first = first or [x.clone() for x in found]
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_workspace_bounds_the_peak():
    rows, vocab, dim = 16384, 32768, 256
    hidden = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, dim, device="cuda") * dim**-0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    cu = torch.tensor([0, rows // 2, rows])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ref = torch.zeros(2, dtype=torch.float64, device="cuda")
    out = linear_una_loss(hidden, weight, targets, cu, Feedback.pairs([0], [1]), ref_logps=ref, workspace_mb=256)
    out.loss.backward()
    returned = hidden.grad.nbytes + weight.grad.nbytes + 4 * vocab * dim
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra <= 1.05 * 256 * 2**20 + 16 * rows


@pytest.mark.parametrize("window", [None, 64])
def test_packed_rows_equal_separate_sequences(window):
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    if window:
        from transformers import MistralConfig, MistralForCausalLM

        config = MistralConfig(**{**config.to_dict(), "sliding_window": window, "model_type": "mistral"})
        model = MistralForCausalLM(config)
    else:
        model = LlamaForCausalLM(config)
    model = model.cuda().bfloat16().eval()
    prompt, responses = torch.randint(128, (300,)), [torch.randint(128, (n,)) for n in (120, 77, 200)]
    bounds = torch.tensor([300, 120, 77, 200]).cumsum(0).tolist()
    segments = (Segment((0, 300), tuple(zip(bounds[:-1], bounds[1:], strict=True))),)
    ids = torch.cat([prompt, *responses])[None].cuda()
    positions = torch.cat([torch.arange(300), *(300 + torch.arange(len(r)) for r in responses)])[None].cuda()
    with torch.no_grad():
        with packed_attention(model):
            packed = model.model(ids, position_ids=positions, use_cache=False, una_segments=segments)[0][0]
        for (start, stop), response in zip(segments[0].responses, responses, strict=True):
            alone = model.model(torch.cat([prompt, response])[None].cuda(), use_cache=False)[0][0, 300:]
            assert relative_error(packed[start:stop].float(), alone.float()) < 3e-2
