"""A sentence for every metric of a run: captions of the report, and the table of docs/metrics.md.

Names follow TRL. A metric of the evaluation has the prefix eval_, and shares the sentence of
the name without the prefix.
"""

from __future__ import annotations

EVAL = "eval_"
OF_REWARD = "rewards/NAME/mean"  # NAME is that of a reward

METRICS = {
    "loss": "Mean loss of a feedback unit (a pair, a label or a score), weights included.",
    "rewards/accuracies": (
        "Share of pairs whose chosen response has the larger implicit reward, without ties."
    ),
    "rewards/margins": "Mean implicit reward of the chosen less that of the rejected responses.",
    "rewards/chosen": "Mean implicit reward of chosen responses: beta * (log pi - log pi_ref).",
    "rewards/rejected": "Mean implicit reward of rejected responses: beta * (log pi - log pi_ref).",
    "logps/chosen": "Mean log-probability of a whole chosen response under the policy.",
    "logps/rejected": "Mean log-probability of a whole rejected response under the policy.",
    "una/implicit_mean": (
        "Mean over labels and scores of the policy's own value: sigmoid(r), or r with reward_mse."
    ),
    "una/target_mean": "Mean of the labels and scores that the policy's own values should meet.",
    "una/calibration_error": (
        "Mean distance between sigmoid(r) and the labels and scores, over ten bins of sigmoid(r)."
    ),
    "log_ratio": (
        "Mean of log pi - log pi_ref over the responses of the data: no KL, and negative where "
        "the policy finds them less likely than the reference does."
    ),
    "kl": "KL from the reference in nats per response, estimated on fresh samples of the policy.",
    "reward": "Mean reward of the samples.",
    "reward_std": "Standard deviation of the rewards over all samples.",
    OF_REWARD: "Mean of the reward NAME alone, before weights.",
    "completions/count": "Samples drawn since the last report.",
    "completions/skipped": "Samples without a reward, which are left out of the loss.",
    "completions/alone": "Samples without another rewarded sample of the same prompt.",
    "completions/mean_length": "Mean length of a sample, in tokens.",
    "completions/clipped_ratio": "Share of samples that were cut at max_new_tokens.",
    "completions/staleness": "Mean age of the samples when they are trained on, in steps.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of the step.",
    "skipped_steps": "Steps so far whose gradient was not finite, and that changed no weight.",
    "epoch": "Passes over the data so far.",
    "units": "Feedback units since the last report.",
    "tokens": "Tokens through the model since the last report, a shared prompt counted once.",
    "response_tokens": "Tokens of responses, which are the scored ones, since the last report.",
    "padding": "Share of computed positions that hold no token.",
    "tok_per_sec": "Tokens per second of training time, sampling and rewards included.",
    "mfu": "Share of the GPU's dense bf16 peak that the linear layers reach, without sampling.",
    "memory/peak_gib": "Peak of memory so far in GiB: allocated on the GPU, or resident on a CPU.",
    "time/generate": "Seconds of sampling since the last report.",
    "time/reward": "Seconds of waiting for rewards since the last report.",
    "time/train": "Seconds of everything else since the last report: scoring, backward, steps.",
}
"""Name -> sentence."""


def table_name(metric: str) -> str | None:
    """Return the name in METRICS of a metric of metrics.jsonl; None for an unknown metric."""
    name = metric.removeprefix(EVAL)
    if name in METRICS:
        return name
    parts = name.split("/")
    is_of_reward = len(parts) > 2 and parts[0] == "rewards" and parts[-1] == "mean"
    return OF_REWARD if is_of_reward else None


def sentence_of(metric: str) -> str:
    """Return the sentence of a metric; an unknown metric has an empty one."""
    name = table_name(metric)
    return METRICS[name] if name else ""
