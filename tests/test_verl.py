"""UNA in verl: the policy loss and the head by verl's protocol, in verl itself where installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast import Feedback, Objective, group_offset, una_loss
from una_fast.integrations import verl as adapter
from una_fast.integrations.verl import MODES, UnaLinearForPPO, una_policy_loss

VERL = importlib.util.find_spec("verl") is not None
BETA = 0.3


def settings(beta: float | None = BETA, **batch: object) -> types.SimpleNamespace:
    """Return what the loss reads of verl's ActorConfig."""
    policy_loss = types.SimpleNamespace(dro_beta=beta)
    return types.SimpleNamespace(policy_loss=policy_loss, global_batch_info=batch)


def rollout(lengths: tuple[int, ...] = (5, 2, 7, 1), width: int = 7) -> dict[str, Tensor]:
    """Return responses padded to a width, with one advantage each."""
    generator = torch.Generator().manual_seed(len(lengths))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -draw(len(lengths), width).abs()
    advantage = draw(len(lengths), 1) * mask
    policy = old + 0.2 * draw(len(lengths), width)
    return {"old": old, "policy": policy, "advantage": advantage, "mask": mask}


def written_out(mode: str, losses: Tensor, mask: Tensor) -> Tensor:
    """Return the aggregate of the losses of the responses, on one rank."""
    used = mask.any(1)
    total = losses[used].sum()
    if mode == "token-sum":
        return total
    if mode == "token-mean":
        return total / mask.sum()
    mean = total / used.sum()
    return mean / mask.shape[1] if mode == "seq-mean-token-sum-norm" else mean


# ---- the policy loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_regression_as_written_out(mode):
    one = rollout((5, 2, 0, 7))  # a response without tokens is no unit
    mask, old, advantage = one["mask"], one["old"], one["advantage"]
    policy = one["policy"].requires_grad_()
    ratio = ((policy - old) * mask).sum(1)
    if mode == "seq-mean-token-mean":
        ratio = ratio / mask.sum(1).clamp(min=1)
    expected = written_out(mode, (BETA * ratio - advantage[:, 0]) ** 2 / (2 * BETA), mask)
    (wanted,) = torch.autograd.grad(expected, policy)
    loss, metrics = una_policy_loss(old, policy, advantage, mask, mode, settings())
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    assert not found[~mask].any() and found[mask].all()
    assert metrics["actor/ppo_kl"] == pytest.approx((old - policy)[mask].mean().item())
    errors = (BETA * ratio - advantage[:, 0])[mask.any(1)] ** 2
    assert metrics["actor/una_error"] == pytest.approx(errors.mean().item())


@pytest.mark.parametrize("mode", MODES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(mode):
    """Learning rate, clipping and entropy_coeff keep their meaning in each mode."""
    one = rollout()
    mask, old, advantage = one["mask"], one["old"], one["advantage"]
    policy = old.clone().requires_grad_()
    per_token = -advantage * (policy - old).exp() * mask  # verl's, before any clip
    losses = per_token.sum(1)
    if mode == "seq-mean-token-mean":
        losses = losses / mask.sum(1)
    (wanted,) = torch.autograd.grad(written_out(mode, losses, mask), policy)
    loss, _ = una_policy_loss(old, policy, advantage, mask, mode, settings())
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(found, wanted)


def test_rloo_with_the_kl_in_the_reward_is_una_with_the_group_offset():
    """Eq. 7 against the reference, its offset taken at the old policy and detached."""
    one = rollout((5, 2, 7, 1, 3, 6))
    mask, old = one["mask"], one["old"]
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    generator = torch.Generator().manual_seed(3)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    reference = old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    # what verl does: the KL penalty token by token, then the mean of the others
    kept = torch.where(mask, -BETA * (old - reference), 0.0).sum(1) + reward
    same = (group[:, None] == group).double()
    others = (same @ kept - kept) / 2
    advantage = (kept - others)[:, None] * mask
    policy = one["policy"].requires_grad_()
    loss, _ = una_policy_loss(old, policy, advantage, mask, "seq-mean-token-sum", settings())
    (found,) = torch.autograd.grad(loss, policy)

    old_sums, reference_sums = ((logps * mask).sum(1) for logps in (old, reference))
    offset = group_offset(BETA * (old_sums - reference_sums) - reward, group)
    units = Feedback.scores(torch.arange(6), reward, offset=offset)
    objective = Objective(beta=BETA, score="reward_mse")
    ours = una_loss((policy * mask).sum(1), reference_sums, units, objective=objective)
    (wanted,) = torch.autograd.grad(ours.loss, policy)
    torch.testing.assert_close(loss, ours.loss / (2 * BETA))
    torch.testing.assert_close(found, wanted / (2 * BETA))


@pytest.mark.parametrize("mode", MODES)
def test_ranks_and_micro_batches_add_up_to_the_batch(mode):
    one = rollout((5, 2, 7, 1, 3, 6))
    mask, old, advantage = one["mask"], one["old"], one["advantage"]
    policy = one["policy"].requires_grad_()
    whole, _ = una_policy_loss(old, policy, advantage, mask, mode, settings())
    sizes = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": 6}
    parts = []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):  # on two ranks, in any order
        call = (old[rows], policy[rows], advantage[rows], mask[rows])
        parts.append(una_policy_loss(*call, mode, settings(**sizes))[0])
    torch.testing.assert_close(sum(parts) / 2, whole)  # gradients are averaged over ranks


def test_padding_may_hold_anything():
    one = rollout((3, 0, 6))
    mask, advantage = one["mask"], one["advantage"]
    clean = una_policy_loss(one["old"], one["policy"], advantage, mask, "token-mean", settings())
    nan, inf = float("nan"), float("inf")
    old = one["old"].masked_fill(~mask, -inf)
    policy = one["policy"].masked_fill(~mask, nan).requires_grad_()
    padded = advantage.masked_fill(~mask, nan)
    loss, metrics = una_policy_loss(old, policy, padded, mask.long(), "token-mean", settings())
    loss.backward()
    assert loss.item() == clean[0].item() and metrics == clean[1]
    assert policy.grad.isfinite().all() and not policy.grad[~mask].any()


def test_a_batch_without_tokens_gives_zero_in_the_graph():
    one = rollout((0, 0))
    policy = one["policy"].requires_grad_()
    loss, _ = una_policy_loss(
        one["old"], policy, one["advantage"], one["mask"], "token-mean", settings()
    )
    loss.backward()
    assert loss.item() == 0 and not policy.grad.any()


def test_importance_weights_of_sequences_weigh_the_units():
    one = rollout()
    call = [one[name] for name in ("old", "policy", "advantage", "mask")]
    weights = torch.tensor([2.0, 0.0, 1.0, 0.5]).double()
    wide = weights[:, None].expand(-1, 7)
    loss, _ = una_policy_loss(*call, "token-sum", settings(), wide)
    alone = [
        una_policy_loss(*(t[k : k + 1] for t in call), "token-sum", settings())[0] for k in range(4)
    ]
    torch.testing.assert_close(loss, (weights * torch.stack(alone)).sum())


def test_the_dtype_is_that_of_the_log_probs_and_sums_are_exact():
    """A float32 sum of 30,000 log-probs is off by a hundredth of a nat."""
    tokens = 30_000
    old = torch.full((1, tokens), -3.1)
    policy = old + 1e-4
    mask = torch.ones(1, tokens)
    loss, _ = una_policy_loss(old, policy, 0 * mask, mask, "token-sum", settings(1.0))
    exact = (policy.double() - old.double()).sum() ** 2 / 2
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": settings(None)}, "dro_beta is None"),
        ({"config": settings(0.0)}, "dro_beta is 0.0"),
        ({"config": None}, "dro_beta is None"),
        ({"mode": "mean"}, "loss_agg_mode='mean' is not one of token-mean"),
        ({"config": settings(dp_size=2)}, "global_batch_size is missing, and 2 ranks"),
        ({"advantage": torch.arange(28.0).view(4, 7)}, "advantages of response 0 lie between 0"),
        ({"advantage": torch.full((4, 7), torch.nan)}, "advantages of response 0 lie between nan"),
        ({"weights": torch.rand(4, 7)}, "rollout_is_weights of response 0 lie between"),
        ({"policy": torch.zeros(4, 6)}, r"log-probs \(4, 6\) and their mask \(4, 7\)"),
    ],
)
def test_what_the_loss_refuses(change, message):
    given = rollout() | {"mode": "seq-mean-token-sum", "config": settings(), "weights": None}
    given |= change
    names = ("old", "policy", "advantage", "mask", "mode", "config", "weights")
    with pytest.raises(ValueError, match=message):
        una_policy_loss(*(given[name] for name in names))


# ---- the head ----------------------------------------------------------------------------------


def head_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [2, 9, 16], a head [53, 16] and ids [2, 9]: peaked logits."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(53, 16, generator=generator, dtype=torch.float64)
    ids = torch.randint(53, (2, 9), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


def eager_head(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple:
    logps = F.log_softmax(hidden.double() @ weight.double().T / temperature, dim=-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, ids[..., None])[..., 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("what", ["log-probs", "entropy", "both"])
def test_values_and_gradients_of_the_head(what, temperature):
    """Also of the entropy alone, as with entropy_coeff and a loss that is 0."""
    hidden, weight, ids = head_case()
    rolled = torch.roll(ids, shifts=-1, dims=-1)  # as verl's forward rolls them
    ours = UnaLinearForPPO(512, impl_backend="torch")(hidden, weight, rolled, temperature)
    truth = eager_head(hidden, weight, rolled, temperature)
    upstream = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(2)).double()
    used = {"log-probs": [0], "entropy": [1], "both": [0, 1]}[what]
    for found, wanted in zip(ours, truth, strict=True):
        assert found.shape == ids.shape
        torch.testing.assert_close(found, wanted)
    grads = []
    for outputs in (ours, truth):
        total = sum((outputs[k] * upstream[k]).sum() for k in used)
        grads.append(torch.autograd.grad(total, (hidden, weight)))
    torch.testing.assert_close(grads[0], grads[1])


def test_the_head_takes_flat_rows_int32_ids_and_no_gradient():
    hidden, weight, ids = head_case(torch.float32)
    flat = (hidden[0], weight, ids[0].to(torch.int32))
    with torch.no_grad():
        logps, entropy = UnaLinearForPPO()(*flat, temperature=2.0)
    wanted = eager_head(hidden[0], weight, ids[0], 2.0)
    torch.testing.assert_close((logps.double(), entropy.double()), wanted, rtol=1e-5, atol=1e-5)
    assert not logps.requires_grad


def test_ids_of_another_shape_are_refused():
    hidden, weight, ids = head_case()
    with pytest.raises(ValueError, match=r"input_ids \(2, 8\) must have the shape"):
        UnaLinearForPPO()(hidden, weight, ids[:, 1:])


# ---- in verl -----------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch):
    """Return verl's three modules, restored after the test; stand-ins where verl is absent."""
    names = ("verl.trainer.ppo.core_algos", adapter._HEAD[0], adapter._PATCH[0])
    if VERL:
        modules = [importlib.import_module(name) for name in names]
        monkeypatch.setattr(
            modules[0], "POLICY_LOSS_REGISTRY", dict(modules[0].POLICY_LOSS_REGISTRY)
        )
    else:
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                whole = ".".join(parts[:end])
                monkeypatch.setitem(sys.modules, whole, types.ModuleType(whole))
        modules = [sys.modules[name] for name in names]
        modules[0].POLICY_LOSS_REGISTRY = registry = {}
        modules[0].register_policy_loss = lambda name: lambda loss: registry.update({name: loss})
        modules[1].FusedLinearForPPO = object

        def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
            model.patched = (use_fused_kernels, fused_kernels_backend)

        modules[2].patch_forward_with_backends = patch_forward_with_backends
    for module, name in zip(modules[1:], (adapter._HEAD[1], adapter._PATCH[1]), strict=True):
        monkeypatch.setattr(module, name, getattr(module, name))
    return modules


def test_installing_twice_registers_the_loss_and_serves_the_head(host):
    algorithms, heads, patches = host
    theirs = patches.patch_forward_with_backends
    adapter.install()
    adapter.install()
    assert algorithms.POLICY_LOSS_REGISTRY["una"] is una_policy_loss
    assert heads.FusedLinearForPPO is UnaLinearForPPO
    assert patches.patch_forward_with_backends.theirs is theirs


def test_the_plugin_module_installs(host):
    sys.modules.pop("una_fast.integrations.verl_plugin", None)
    importlib.import_module("una_fast.integrations.verl_plugin")
    assert "una" in host[0].POLICY_LOSS_REGISTRY


@pytest.mark.skipif(VERL, reason="verl is installed: the next tests run its own function")
@pytest.mark.parametrize("backend", ["torch", "triton", "liger", None])
def test_every_backend_becomes_ours(host, backend):
    adapter.install()
    model = torch.nn.Linear(1, 1)
    host[2].patch_forward_with_backends(model, True, backend)
    assert model.patched == (True, "torch")
    host[2].patch_forward_with_backends(model, use_fused_kernels=False)
    assert model.patched == (False, None)


needs_verl = pytest.mark.skipif(not VERL, reason="verl is not installed: tests/versions.sh hosts")


@needs_verl
def test_verl_installs_the_plugin_that_its_environment_names():
    code = """
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.experimental.torch_functional import FusedLinearForPPO
print(get_policy_loss_fn("una").__module__, FusedLinearForPPO.__module__)
"""
    env = os.environ | {"VERL_USE_EXTERNAL_MODULES": "una_fast.integrations.verl_plugin"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["una_fast.integrations.verl"] * 2


@needs_verl
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_at_the_old_policy_is_that_of_verls_own_loss(host, mode):
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    adapter.install()
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="una", dro_beta=BETA),
    )
    one = rollout()
    policy = one["old"].clone().requires_grad_()
    call = (one["old"], policy, one["advantage"], one["mask"], mode, config)
    grads = []
    for name in ("una", "vanilla"):
        loss, metrics = host[0].get_policy_loss_fn(name)(*call)
        grads.append(torch.autograd.grad(loss, policy)[0])
        assert all(isinstance(value, float) for value in metrics.values())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


@needs_verl
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_patched_model_gives_the_log_probs_of_its_logits(host, monkeypatch, backend):
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter.install()
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(61, (1, 12))
    logits = model(input_ids=ids, use_cache=False).logits
    truth = eager_head(logits, torch.eye(61), torch.roll(ids, shifts=-1, dims=-1), 0.8)
    host[2].patch_forward_with_backends(model, True, backend)
    out = model(input_ids=ids, use_cache=False, return_dict=True, temperature=0.8)
    torch.testing.assert_close(
        (out.log_probs.double(), out.entropy.double()), truth, rtol=1e-5, atol=1e-5
    )
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@needs_verl
def test_the_signatures_are_verls(host):
    """A renamed argument of a later verl fails here, not in a run."""
    theirs = inspect.signature(host[0].get_policy_loss_fn("gspo")).parameters
    assert list(inspect.signature(una_policy_loss).parameters) == list(theirs)
    patch = inspect.signature(host[2].patch_forward_with_backends).parameters
    ours = inspect.signature(adapter._PatchForward.__call__).parameters
    assert list(ours)[1:] == list(patch)
    heads = (host[1].FusedLinearForPPO, UnaLinearForPPO)
    for name in ("__init__", "forward"):
        theirs, ours = (list(inspect.signature(getattr(h, name)).parameters) for h in heads)
        assert ours == theirs
