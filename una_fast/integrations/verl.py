"""UNA inside verl: the policy loss "una", and the fused head of its actor.

In the environment of every worker, and in the settings (`una_fast.integrations.verl_plugin` calls
`install()` when verl imports it):

    VERL_USE_EXTERNAL_MODULES=una_fast.integrations.verl_plugin
    actor_rollout_ref.actor.policy_loss.loss_mode=una
    actor_rollout_ref.actor.policy_loss.dro_beta=0.1        # beta of the implicit reward
    actor_rollout_ref.model.use_fused_kernels=true          # the head, with any policy loss
    algorithm.adv_estimator=rloo
    algorithm.use_kl_in_reward=true
    algorithm.kl_penalty=kl
    algorithm.kl_ctrl.kl_coef=0.1                           # the same beta

The loss. verl gives a policy loss the log-probs under the policy of the rollout and the advantages,
neither the reference nor the groups. With D = log pi - log pi_old, summed over the tokens of a
response, and A the advantage of the response:

    loss = (beta D - A)^2 / (2 beta)

With the settings above the loss is UNA's regression on rewards (eq. 7), divided by 2 beta. verl
subtracts beta log(pi_old / pi_ref) from the reward R, and RLOO subtracts the mean of the others:

    beta D - A = r + o - R,    r = beta log(pi / pi_ref),    o = group_offset(r_old - R, group)

with the offset o taken at pi_old, detached. At pi = pi_old the gradient is -A grad log pi, verl's
own: learning rate, clipping and `entropy_coeff` keep their meaning in every `loss_agg_mode`. Later
mini-batches of a step are regressed on, without an importance ratio or a clip.

Without `use_kl_in_reward` the reference of the regression is pi_old alone. GRPO's advantages are
divided by the standard deviation of a group unless `norm_adv_by_std_in_grpo=false`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from una_fast.feedback import Feedback
from una_fast.head.ops import token_logps
from una_fast.integrations.calls import count_call
from una_fast.integrations.responses import one_per_response, response_sums
from una_fast.integrations.versions import TESTED, check_version
from una_fast.logs import say_once
from una_fast.losses import Objective, una_loss

logger = logging.getLogger(__name__)

NAME = "una"
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)

_REGISTER = ("verl.trainer.ppo.core_algos", "register_policy_loss")
_HEAD = ("verl.utils.experimental.torch_functional", "FusedLinearForPPO")
_PATCH = ("verl.models.transformers.monkey_patch", "patch_forward_with_backends")


def install() -> None:
    """Register the policy loss and serve the fused head, in this process; once is enough."""
    check_version("verl")
    # All of them, before anything of verl is changed.
    _, register = _found(*_REGISTER)
    heads, _ = _found(*_HEAD)
    patches, theirs = _found(*_PATCH)
    register(NAME)(una_policy_loss)
    setattr(heads, _HEAD[1], UnaLinearForPPO)
    if not isinstance(theirs, _PatchForward):
        setattr(patches, _PATCH[1], _PatchForward(theirs))


def _found(module: str, name: str) -> tuple[ModuleType, Any]:
    """Return a module of verl, and what it calls `name`; ImportError where verl has no such."""
    try:
        holder = importlib.import_module(module)
        return holder, getattr(holder, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"this verl has no {module}.{name}, which una_fast replaces; install verl "
            f"{TESTED['verl'].releases}, or unset VERL_USE_EXTERNAL_MODULES"
        ) from error


# ---- the policy loss ---------------------------------------------------------------------------


def una_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the regression of the implicit reward on the advantage: verl's policy-loss protocol.

    old_log_prob: [B, T] log-probs under the policy of the rollout
    log_prob: [B, T] log-probs under the policy, carries the gradient
    advantages: [B, T] the same number for all tokens of a response
    response_mask: [B, T] bool or numbers; a row without tokens is left out
    loss_agg_mode: one of MODES; "seq-mean-token-mean" averages D over the tokens of a response
    config: verl's ActorConfig; `policy_loss.dro_beta` is beta, `global_batch_info` the sizes of the
        global batch
    rollout_is_weights: [B, T] factor on the loss of a response, the same for all of its tokens

    Returns the loss, [] in the dtype of log_prob, and verl's metrics.

    ValueError for a missing beta, an unknown mode, and numbers that differ within a response.
    """
    beta = _beta(config)
    divisor = _divisor(loss_agg_mode, response_mask, getattr(config, "global_batch_info", None))
    mask = response_mask.bool()
    units = mask.any(1).nonzero().squeeze(1)
    weight = None
    if rollout_is_weights is not None:
        hint = "set the rollout correction to the level of sequences"
        weight = one_per_response("rollout_is_weights", rollout_is_weights, mask, hint)[units]
    hint = "choose an estimator with one advantage per response: rloo, grpo, opo, remax"
    target = one_per_response("advantages", advantages, mask, hint)[units]
    out = una_loss(
        response_sums(log_prob, mask),
        response_sums(old_log_prob.detach(), mask),
        Feedback.scores(units, target, weight=weight),
        objective=Objective(
            beta=beta,
            score="reward_mse",
            length_normalize=loss_agg_mode == "seq-mean-token-mean",
        ),
        num_units=divisor,
        lengths=mask.sum(1).clamp_min(1),
    )
    tokens = mask.sum().clamp_min(1)
    metrics = {
        "actor/ppo_kl": ((out.ref_logps - out.logps).sum() / tokens).item(),
        "actor/una_reward": out.rewards[units].sum().item() / max(len(units), 1),
        "actor/una_error": out.unit_losses.sum().item() / max(len(units), 1),
    }
    return (out.loss / (2 * beta)).to(log_prob.dtype), metrics


def _beta(config: Any) -> float:
    """Return beta of the settings."""
    beta = getattr(getattr(config, "policy_loss", None), "dro_beta", None)
    if beta is None or not beta > 0:
        raise ValueError(
            f'policy_loss.dro_beta is {beta}; the policy loss "una" reads its beta there, set '
            "actor_rollout_ref.actor.policy_loss.dro_beta to a positive number such as 0.1"
        )
    return float(beta)


def _divisor(mode: str, mask: Tensor, batch: Mapping[str, Any] | None) -> float | Tensor:
    """Return the number by which the sum of the losses of the responses is divided.

    mode: one of MODES
    mask: [B, T] tokens of the responses
    batch: verl's dp_size, batch_num_tokens, global_batch_size and loss_scale_factor; a number that
        is None, or missing, is counted in the mask

    verl averages gradients over dp_size ranks, so that the sizes of the global batch are divided by
    dp_size.
    """
    if mode not in MODES:
        raise ValueError(f"loss_agg_mode={mode!r} is not one of {', '.join(MODES)}")
    batch = batch or {}
    ranks = batch.get("dp_size") or 1
    if mode == "token-sum":
        return 1 / ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    size = batch.get(name)
    if size is None:
        if ranks > 1:
            raise ValueError(f"{name} is missing, and {ranks} ranks cannot count it alone")
        counted = mask.bool() if mode == "token-mean" else mask.bool().any(1)
        size = counted.sum().clamp_min(1)
    if mode == "seq-mean-token-sum-norm":
        size = size * (batch.get("loss_scale_factor") or mask.shape[-1])
    return size / ranks


# ---- the head ----------------------------------------------------------------------------------


class UnaLinearForPPO(nn.Module):
    """verl's FusedLinearForPPO: log-probs and entropy of the head's rows, without their logits."""

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
        """Take the arguments of verl's class, which choose among its own heads.

        chunk_size: rows per chunk of verl's head; the fused head plans its own
        impl_backend: of verl's head; the fused head chooses its engine by the device
        """
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, each of the shape of input_ids, in float32 or float64.

        hidden_states: [..., D]
        vocab_weights: [V, D]
        input_ids: [...] the next token of every state, as rolled by verl's forward
        temperature: divisor of the logits, a number
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} must have the shape of hidden_states "
                f"{tuple(hidden_states.shape)} without the last dimension"
            )
        count_call("padded")
        logps, stats = token_logps(
            hidden_states.flatten(0, -2),
            vocab_weights,
            input_ids.flatten().to(torch.int64),
            temperature=float(temperature),
            stats=("entropy",),
        )
        return logps.view(input_ids.shape), stats["entropy"].view(input_ids.shape)


class _PatchForward:
    """verl's patch_forward_with_backends; every backend becomes the one with our head."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(
        self,
        model: nn.Module,
        use_fused_kernels: bool = False,
        fused_kernels_backend: str | None = None,
    ) -> None:
        """Patch the forward of the model's class.

        model: a causal LM
        use_fused_kernels: whether to patch
        fused_kernels_backend: verl's choice, "torch", "triton" or "liger"
        """
        if use_fused_kernels:
            message = f"una_fast computes the head of {type(model).__name__} in verl"
            say_once(logging.INFO, message, logger)
            fused_kernels_backend = "torch"
        self.theirs(
            model,
            use_fused_kernels=use_fused_kernels,
            fused_kernels_backend=fused_kernels_backend,
        )
