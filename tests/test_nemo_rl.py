"""UNA in NeMo-RL, by its protocol; beside its own loss where $NEMO_RL_CHECKOUT names a checkout."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Optional
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from una_fast import Feedback, Objective, una_loss
from una_fast.integrations import nemo_rl as adapter
from una_fast.integrations.nemo_rl import KINDS, UNALoss

CHECKOUT = os.environ.get("NEMO_RL_CHECKOUT", "")
BETA = 0.3


class LossType:
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType:
    LOGPROB = "logprob"


class MetricNormalizer:
    SEQUENCES = "sequences"
    NONE = "none"


@pytest.fixture
def protocol(monkeypatch):
    """Put a stand-in in the place of NeMo-RL's interfaces, as they are after 0.7."""
    parts = adapter._INTERFACES.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interfaces = sys.modules[adapter._INTERFACES]
    interfaces.LossType, interfaces.LossInputType = LossType, LossInputType
    interfaces.MetricNormalizer = MetricNormalizer
    return interfaces


def micro_batch(rows: int = 6, width: int = 9, rolled: bool = True) -> tuple[Tensor, dict]:
    """Return next-token log-probs [B, T - 1] and NeMo-RL's columns, with prompts and padding."""
    generator = torch.Generator().manual_seed(rows)
    places = torch.arange(width)
    starts = torch.randint(1, 3, (rows, 1), generator=generator)
    ends = torch.randint(4, width + 1, (rows, 1), generator=generator)
    token_mask = ((places >= starts) & (places < ends)).double()
    at_token = -torch.randn(rows, width, generator=generator, dtype=torch.float64).abs()
    policy = at_token[:, 1:] + 0.3 * torch.randn(rows, width - 1, generator=generator).double()
    data = {
        "input_ids": torch.zeros(rows, width, dtype=torch.int64),
        "token_mask": token_mask,
        "sample_mask": torch.ones(rows, dtype=torch.float64),
        "reference_policy_logprobs": at_token.roll(-1, dims=-1) if rolled else at_token,
    }
    return policy, data


def written_out_sums(policy: Tensor, data: dict, rolled: bool = True) -> tuple[Tensor, Tensor]:
    """Return [B] log-probs of policy and reference, summed token by token."""
    logps, references = [], []
    for row in range(len(policy)):
        tokens = [t for t in range(1, policy.shape[1] + 1) if data["token_mask"][row, t]]
        column = data["reference_policy_logprobs"][row]
        logps.append(sum(policy[row, t - 1] for t in tokens))
        references.append(sum(column[t - 1 if rolled else t] for t in tokens))
    return torch.stack(logps), torch.stack(references)


def test_pairs_are_dpo_as_written_out(protocol):
    policy, data = micro_batch()
    policy.requires_grad_()
    logps, references = written_out_sums(policy, data)
    ratio = logps - references
    lead = BETA * (ratio[::2] - ratio[1::2])
    expected = -torch.log(torch.sigmoid(lead)).sum() / 5  # 10 valid rows of the global batch
    (wanted,) = torch.autograd.grad(expected, policy)
    loss_fn = UNALoss(Objective(beta=BETA))
    loss, metrics = loss_fn(policy, data, torch.tensor(10.0), None)
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    assert metrics["loss"] == metrics["preference_loss"] == pytest.approx(expected.item())
    assert metrics["accuracy"] == pytest.approx((lead > 0).sum().item() / 5)
    assert metrics["rewards_chosen_mean"] == pytest.approx(ratio[::2].sum().item() / 5)
    assert metrics["rewards_rejected_mean"] == pytest.approx(ratio[1::2].sum().item() / 5)
    assert metrics["num_valid_samples"] == 3


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_una_loss_of_the_sums(protocol, kind, normalize, rolled):
    """Both places of the reference, sums and means, labels with offsets, pairs with margins."""
    policy, data = micro_batch(rolled=rolled)
    policy.requires_grad_()
    objective = Objective(beta=BETA, score="reward_mse", length_normalize=normalize)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    scores = torch.tensor([2.0, -1.0, 0.3, 0.0, 5.0, 1.0])
    offset = torch.linspace(-1, 1, 6)
    data["una_weight"] = 1 + offset.abs()
    if kind == "pairs":
        data["una_margin"] = offset.abs()
    else:
        data |= {"una_offset": offset, "una_value": labels if kind == "binary" else scores}
    rows, weight = torch.arange(6), 1 + offset.abs()
    feedback = {
        "pairs": Feedback.pairs(
            rows[::2], rows[1::2], margin=offset.abs()[::2], weight=weight[::2]
        ),
        "binary": Feedback.binary(rows, labels, offset=offset, weight=weight),
        "scores": Feedback.scores(rows, scores, offset=offset, weight=weight),
    }[kind]
    logps, references = written_out_sums(policy, data, rolled)
    lengths = data["token_mask"][:, 1:].sum(1)
    units = 10 if kind != "pairs" else 5
    given = {"objective": objective, "num_units": units, "lengths": lengths}
    expected = una_loss(logps, references, feedback, **given)
    (wanted,) = torch.autograd.grad(expected.loss, policy)
    loss_fn = UNALoss(objective, kind, rolled_reference=rolled)
    loss, metrics = loss_fn(policy, data, torch.tensor(10), torch.tensor(99))
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(found, wanted)
    if kind != "pairs":
        mean = (expected.rewards / BETA).sum().item() / 10
        assert metrics["rewards_mean"] == pytest.approx(mean)
    assert set(metrics) == set(loss_fn.metric_normalizations)


def test_micro_batches_add_up_and_masked_rows_leave_the_mean(protocol):
    """Losses and metrics are sums over micro-batches, divided by the units of the global batch."""
    policy, data = micro_batch(8)
    data["sample_mask"][2:4] = 0
    loss_fn = UNALoss(Objective(beta=BETA))
    valid = data["sample_mask"].sum()
    whole, metrics = loss_fn(policy, data, valid, None)
    parts = [
        loss_fn(policy[k : k + 2], {n: v[k : k + 2] for n, v in data.items()}, valid, None)
        for k in range(0, 8, 2)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in metrics.items():
        assert sum(part[name] for _, part in parts) == pytest.approx(value), name
    assert metrics["num_valid_samples"] == 3
    kept = [0, 1, 4, 5, 6, 7]
    alone, _ = loss_fn(policy[kept], {n: v[kept] for n, v in data.items()}, valid, None)
    torch.testing.assert_close(alone, whole)


def test_padding_may_hold_anything_and_no_valid_row_gives_zero(protocol):
    policy, data = micro_batch()
    clean = UNALoss()(policy, data, torch.tensor(6), None)[0]
    outside = data["token_mask"][:, 1:] == 0
    policy = policy.masked_fill(outside, float("nan")).requires_grad_()
    reference = data["reference_policy_logprobs"]
    reference[:, :-1][outside] = float("-inf")
    loss, _ = UNALoss()(policy, data, torch.tensor(6), None)
    loss.backward()
    assert loss.item() == clean.item() and policy.grad.isfinite().all()
    data["sample_mask"].zero_()
    assert UNALoss()(policy, data, torch.tensor(0), None)[0].item() == 0


def test_scores_may_be_advantages_per_token(protocol):
    policy, data = micro_batch(rolled=False)
    score = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0, -0.1])
    columns = {"una_value": score, "advantages": score[:, None] * data["token_mask"]}
    objective = Objective(beta=BETA, score="reward_mse")
    losses = []
    for column, values in columns.items():
        loss_fn = UNALoss(objective, "scores", column=column, rolled_reference=False)
        losses.append(loss_fn(policy, data | {column: values}, torch.tensor(6), None)[0])
    torch.testing.assert_close(*losses)
    data["advantages"] = data["token_mask"].cumsum(1)
    with pytest.raises(ValueError, match="advantages of response 0 lie between"):
        loss_fn(policy, data, torch.tensor(6), None)


def test_what_the_loss_refuses(protocol):
    with pytest.raises(ValueError, match="kind='pair' is not one of pairs, binary, scores"):
        UNALoss(kind="pair")
    policy, data = micro_batch(5)
    with pytest.raises(ValueError, match="a micro-batch of 5 rows holds half a pair"):
        UNALoss()(policy, data, torch.tensor(4), None)
    with pytest.raises(ValueError, match="no column 'una_value' with the scores; set column to"):
        UNALoss(kind="scores")(policy, data, torch.tensor(4), None)
    with pytest.raises(ValueError, match=r"log-probs \(5, 7\) and their mask \(5, 8\)"):
        UNALoss(kind="binary")(policy[:, 1:], data | {"una_value": data["sample_mask"]}, 5, None)


@pytest.mark.parametrize("name", ["token_mask", "sample_mask", "reference_policy_logprobs"])
def test_a_missing_column_of_theirs_is_named(protocol, name):
    policy, data = micro_batch()
    del data[name]
    with pytest.raises(ValueError, match=f"no column '{name}'"):
        UNALoss()(policy, data, torch.tensor(6), None)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("pairs", "una_offset"),
        ("pairs", "una_value"),
        ("binary", "una_target"),
        ("scores", "una_margin"),
        ("scores", "una_wieght"),
    ],
)
def test_columns_that_the_kind_does_not_read_are_refused(protocol, kind, name):
    policy, data = micro_batch()
    zeros = torch.zeros(6)
    data |= {name: zeros} if kind == "pairs" else {name: zeros, "una_value": zeros}
    with pytest.raises(ValueError, match=f"kind='{kind}' does not read the column '{name}'"):
        UNALoss(kind=kind)(policy, data, torch.tensor(6), None)


def test_the_loss_travels_to_workers(protocol):
    """Ray pickles the loss; up to 0.7 there is no normaliser of metrics."""
    del protocol.MetricNormalizer
    copy = pickle.loads(pickle.dumps(UNALoss(Objective(beta=BETA))))
    policy, data = micro_batch()
    wanted = UNALoss(Objective(beta=BETA))(policy, data, torch.tensor(6), None)
    assert copy(policy, data, torch.tensor(6), None) == wanted
    assert (copy.loss_type, copy.input_type) == ("sequence_level", "logprob")
    assert not hasattr(copy, "metric_normalizations")


# ---- beside NeMo-RL's own loss -----------------------------------------------------------------


THEIRS = ("nemo_rl.algorithms.loss.interfaces", "nemo_rl.algorithms.loss.loss_functions")


class StandIns:
    """Finds the modules THEIRS in the checkout, and a stand-in for every other of NeMo-RL's."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name.split(".")[0] != "nemo_rl":
            return None
        if name in THEIRS:
            file = Path(CHECKOUT, *name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: object) -> types.ModuleType:
        return MagicMock(name=spec.name, __spec__=spec, __path__=[])

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@pytest.fixture
def theirs(monkeypatch):
    """Return the module with NeMo-RL's losses, from a checkout, with its own mean."""
    if not CHECKOUT:
        pytest.skip("NEMO_RL_CHECKOUT names no checkout of github.com/NVIDIA-NeMo/RL")
    pytest.importorskip("pydantic")
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", [StandIns(), *sys.meta_path])
    module = importlib.import_module(THEIRS[1])
    utils = Path(CHECKOUT, "nemo_rl", "algorithms", "utils.py").read_text(encoding="utf-8")
    (mean,) = [
        node
        for node in ast.parse(utils).body
        if isinstance(node, ast.FunctionDef) and node.name == "masked_mean"
    ]
    exec(ast.unparse(mean), {"torch": torch, "Optional": Optional}, vars(module))
    yield module
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "nemo_rl":
            del sys.modules[name]


def test_pairs_are_their_dpo(theirs):
    """The same loss, gradient and metrics from the same data, to NeMo-RL's own 1e-8."""
    policy, data = micro_batch(8)
    data["sample_mask"][2:4] = 0
    valid = data["sample_mask"].sum()
    config = theirs.DPOLossConfig
    fields = {
        "reference_policy_kl_penalty": BETA,
        "preference_loss_weight": 1.0,
        "sft_loss_weight": 0.0,
        "preference_average_log_probs": False,
        "sft_average_log_probs": False,
    }
    their_loss = theirs.DPOLossFn(config(**fields))
    ours = UNALoss(Objective(beta=BETA))
    assert (ours.loss_type, ours.input_type) == (their_loss.loss_type, their_loss.input_type)
    policy.requires_grad_()
    found, wanted = (f(policy, data, valid, None) for f in (ours, their_loss))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-7, atol=0)
    grads = [torch.autograd.grad(loss, policy)[0] for loss, _ in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        # theirs averages the chosen rewards over chosen rows; the two are the same rows
        assert found[1][name] == pytest.approx(value, rel=1e-6), name
