"""Ranks that split the tokens of a row are one process: head, attention, models and training."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch

from context_worker import FOR_TWO, MODELS, batch_of
from families import UNPACKED, build, packed_row, segments_of
from helpers import WAYS, problem, reference
from ranks import run_ranks, saved_weights, worst_error
from runs import settings_of
from tiny import make_config, make_records, read_metrics, write_jsonl
from una_fast import Feedback, Objective, linear_una_loss
from una_fast.attention.packed import packed_attention_forward
from una_fast.attention.split_probe import Meeting, ThreadGroup, split_refusal
from una_fast.attention.ulysses import padded_segments, padded_tokens
from una_fast.data.batch import collate
from una_fast.data.split import split_batch
from una_fast.group import Group
from una_fast.head.plan import HeadSize, make_plan
from una_fast.parallel import ParallelOptions
from una_fast.resolved import find_facts
from una_fast.train.precompute import precompute_reference

REWARD = f"{Path(__file__).with_name('reward_functions.py')}:share_of_e"
RANKS = (2, 4)
STEPS = 10
SGD = {"optimizer": "sgd", "learning_rate": 0.02, "max_grad_norm": None, "beta": 0.2}
SPLIT = {"parallel": {"context": 2}}
TIMES = ("tok_per_sec", "memory/peak_gib", "padding", "eval_padding")
TIMES += ("time/generate", "time/reward", "time/train")

# Runs by two ranks (one row over both) and by four (two rows, over two ranks each). Five records a
# step in micro-batches of one: in the last step, of one record, ranks have none.
OFFLINE = SGD | {"batch_size": 5, "micro_batch_size": 1}
ONLINE = SGD | {
    "mode": "online",
    "rewards": [REWARD],
    "score": "reward_mse",
    "offset": "ema",
    "anchor": "rollout",
    "samples_per_prompt": 3,
    "max_new_tokens": 9,
    "batch_size": 5,
    "micro_batch_size": 2,
    "max_steps": 2,
    "epochs": 9.0,
}
RUNS = {
    "full": OFFLINE,
    "lora": OFFLINE | {"lora": {"r": 4, "alpha": 8}, "gradient_checkpointing": True},
    "cached": OFFLINE | {"max_steps": 2},
    "online": ONLINE,
}
BY = {2: ("full", "cached"), 4: ("full", "lora", "online")}


@pytest.fixture(scope="module")
def found(llamas, tmp_path_factory):
    """Run the worker once; return its directory."""
    root = tmp_path_factory.mktemp("context")
    model = llamas["untied"]
    records = write_jsonl(root / "records.jsonl", make_records("mixed", 5 * (STEPS - 1) + 1))
    prompts = [{"prompt": one["prompt"]} for one in make_records("scores", 12)]
    config = make_config(model, [records], root / "ref", batch_size=8)
    (cached,) = precompute_reference(config)["data"]
    data = {
        "full": [records],
        "lora": [records],
        "cached": [cached],
        "online": [write_jsonl(root / "prompts.jsonl", prompts)],
    }
    held_out = write_jsonl(root / "eval.jsonl", make_records("mixed", 7, seed=5))
    runs: dict[str, dict] = {}
    for ranks, names in {1: RUNS, **BY}.items():
        for name in names:
            out = root / str(ranks) / name
            settings = RUNS[name] | ({} if ranks == 1 else SPLIT)
            if name == "full":
                settings = settings | {"eval_data": [held_out]}
            case = {"config": settings_of(make_config(model, data[name], out)) | settings}
            runs.setdefault(str(ranks), {})[name] = case | {"fixed": name == "online"}
    settings = settings_of(make_config(model, [records], root / "split ref", batch_size=8))
    runs["4"]["reference"] = {"precompute": settings | SPLIT}
    cases = root / "cases.json"
    cases.write_text(json.dumps({"out": str(root), "runs": runs}))
    for ranks in (1, *RANKS):
        run_ranks("context_worker", cases, root / f"log-{ranks}", ranks)
    return root


@pytest.fixture(scope="module", params=RANKS)
def cases(request, found):
    """Return what every rank of two, or of four, found."""
    paths = [found / f"ranks-{request.param}-{rank}.pt" for rank in range(request.param)]
    return [torch.load(path, weights_only=True) for path in paths]


# ---- the head -----------------------------------------------------------------------------------


def test_every_way_of_the_head_is_that_of_one_process(cases):
    """Losses, log-probs, rows of the hidden gradient, and the summed gradients of the head."""
    names = [name for name in cases[0] if name.startswith(("head: ", "plan: "))]
    assert len(names) > 3 * len(WAYS)
    for name in names:
        for rank, case in enumerate(cases):
            assert case[name]["error"] <= 1e-10, f"{name}, rank {rank}"


def test_every_kind_of_plan_was_taken(cases):
    """Ranks of a call may go different ways, and some have no rows at all."""
    taken, mixed = set(), 0
    for name in cases[0]:
        if name.startswith("head: ") and not name.endswith("nothing"):
            plans = {tuple(case[name]["plan"]) for case in cases}
            taken |= plans
            mixed += len(plans - {()}) > 1
    kinds = {kind for plan in taken for kind in plan}
    assert kinds == {"resident", "streamed", "scratch", "recomputed", "unscored", "sliced"}
    assert () in taken and mixed > 10


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resident", {"resident"}),
        ("streamed pair", {"streamed"}),
        ("streamed label", {"streamed"}),
        ("recomputed", {"recomputed"}),
    ],
)
def test_known_plans(cases, name, kinds):
    """A rank with rows of a single response streams what others compute again."""
    plans = [set(case[f"plan: {name}"]["plan"]) - {"unscored"} for case in cases]
    assert kinds in plans
    assert all(plan <= kinds | {"streamed"} for plan in plans)


def test_a_call_of_the_head_is_one_all_reduce_of_as_many_numbers_as_responses(cases):
    """The reference's hidden states, where given, are one more."""
    for case in cases:
        for name, one in case.items():
            if name.startswith(("head: ", "plan: ")):
                assert one["sums"] in (1, 2) and one.get("exchanges", 0) == 0
            if name.startswith("plan: "):
                assert one["sums"] == 1
        assert (case["sums"]["sums"], case["sums"]["summed"]) == (1, 8)


def test_sums_and_their_gradients(cases):
    assert all(case["sums"]["error"] <= 1e-10 for case in cases)


# ---- models -------------------------------------------------------------------------------------


def test_models_are_those_of_one_process(cases):
    """Loss, log-probs, every gradient; also rows shorter than the group, and without examples."""
    names = [name for name in cases[0] if name.startswith(("model: ", "row: "))]
    assert len(names) == 2 + len(MODELS if len(cases) == 4 else FOR_TWO)
    for name in names:
        of_rank = [case[name] for case in cases]
        first = of_rank[0]
        assert first["values"] <= 1e-6 and first["gradients"] <= 1e-5, name
        assert all(one["loss"] == first["loss"] for one in of_rank), name


def test_a_layer_is_four_all_to_alls_in_each_direction(cases):
    """Checkpointed layers are run once more in backward."""
    for name, one in chain.from_iterable(case.items() for case in cases):
        if not name.startswith("model: "):
            continue
        once = 4 * one["layers"]
        recomputed = 2 if "checkpointed" in name else 1
        sums = {"sums": 1, "summed": one["responses"]}
        assert one["forward"] == {"exchanges": once, **sums}, name
        assert one["backward"] == {"exchanges": once * recomputed}, name


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks, names in BY.items() for name in names]
)
def test_a_run_is_that_of_one_process(found, ranks, name):
    """Gradients, metrics and weights of every step; a group without records in the last one."""
    ours, theirs = found / str(ranks) / name, found / "1" / name
    steps = [torch.load(out / "gradients.pt", weights_only=True) for out in (ours, theirs)]
    assert len(steps[0]) == len(steps[1]) == RUNS[name].get("max_steps", STEPS)
    for number, (split, whole) in enumerate(zip(*steps, strict=True), start=1):
        assert worst_error(split, whole) <= 1e-5, f"step {number}"
    lines = [read_metrics(out, without=TIMES) for out in (ours, theirs)]
    for split, whole in zip(*lines, strict=True):
        for line in (split, whole):
            if line["step"] == 1:  # sigmoid(0) lies between two bins, and rounding decides
                line.pop("una/calibration_error", None)
        # Rewards are small differences of log-probs of some hundred nats, in float32.
        assert split == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert worst_error(saved_weights(ours), saved_weights(theirs)) <= 1e-5


def test_reference_log_probs_are_those_of_one_process(found):
    columns = []
    for name in ("ref", "split ref"):
        lines = (found / name / "data-00-records.jsonl").read_text().splitlines()
        columns.append([json.loads(line)["ref_logps"] for line in lines])
    assert len(columns[0]) == 5 * (STEPS - 1) + 1
    for whole, split in zip(*columns, strict=True):
        assert split == pytest.approx(whole, rel=1e-6)


# ---- attention, with threads as ranks -----------------------------------------------------------

ROW = segments_of((11, 7), ((9, 6, 14), (8, 13)))


def in_threads(ranks, work):
    """Return work(group) of every rank, each in a thread."""
    meeting = Meeting(threading.Barrier(ranks, timeout=60), [()] * ranks)

    def run(rank):
        try:
            return work(ThreadGroup(rank, ranks, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


HEADS = [(4, 4, 2), (4, 1, 4), (6, 2, 3), (12, 3, 2), (12, 4, 6), (12, 3, 4), (6, 3, 1), (8, 2, 8)]


@pytest.mark.parametrize(("heads", "keys", "ranks"), HEADS)
def test_any_number_of_key_heads(heads, keys, ranks):
    """Windows, softcaps and sinks too; values of another size; every gradient."""
    torch.manual_seed(0)
    total = sum(one.prompt[1] - one.prompt[0] for one in ROW)
    total += sum(stop - start for one in ROW for start, stop in one.responses)
    padded = padded_tokens(total, ranks)
    segments = padded_segments(ROW, total, padded)
    shapes = [(1, heads, padded, 8), (1, keys, padded, 8), (1, keys, padded, 6), (heads,)]
    states = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(1, padded, heads, 6, dtype=torch.float64)
    rule = {"sliding_window": 5, "softcap": 3.0, "scaling": 0.7}

    def attend(own, upstream, group):
        leaves = [x.clone().requires_grad_() for x in own]
        query, key, value, sinks = leaves
        out, _ = packed_attention_forward(
            torch.nn.Module(),
            query,
            key,
            value,
            s_aux=sinks,
            una_segments=segments,
            una_context=group,
            **rule,
        )
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    def part(group):
        own = [x.chunk(ranks, dim=2)[group.rank] for x in states[:3]]
        return attend([*own, states[3]], upstream.chunk(ranks, dim=1)[group.rank], group)

    expected = attend(states, upstream, Group())
    outs, *grads, sinks = zip(*in_threads(ranks, part), strict=True)
    joined = [torch.cat(outs, dim=1), *(torch.cat(grad, dim=2) for grad in grads), sum(sinks)]
    for ours, theirs in zip(joined, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_query_heads_that_ranks_do_not_divide():
    states = torch.zeros(1, 4, 20, 8)
    with pytest.raises(ValueError, match=r"4 query heads .* by 3 ranks \(4 / 3 = 1.333\).* 2 div"):
        packed_attention_forward(
            torch.nn.Module(),
            states,
            states,
            states,
            una_segments=segments_of((20,), ((40,),)),
            una_context=Group(0, 3),
        )


# ---- parts of a batch ---------------------------------------------------------------------------


def test_parts_hold_every_token_and_every_row_once():
    for name in ("ragged", "short", "none"):
        batch = batch_of(name)
        total = batch.input_ids.shape[1]
        for ranks in (2, 3, 4, 7):
            parts = [split_batch(batch, Group(rank, ranks)) for rank in range(ranks)]
            ids = torch.cat([part.input_ids for part in parts], dim=1)
            tokens = ids.shape[1] // ranks
            assert ids.shape[1] - total < ranks and ids[0, :total].equal(batch.input_ids[0])
            assert all(part.input_ids.shape == (1, tokens) for part in parts)
            positions = torch.cat([part.position_ids for part in parts], dim=1)
            assert positions[0, :total].equal(batch.position_ids[0])
            assert positions[0, total:].tolist() == list(range(ids.shape[1] - total))
            for response in range(len(batch.cu_seqlens) - 1):
                rows, targets = [], []
                for rank, part in enumerate(parts):
                    own = slice(*part.cu_seqlens[response : response + 2].tolist())
                    assert part.rows.equal(part.host_rows) and (part.rows[own] < tokens).all()
                    rows += (part.rows[own] + rank * tokens).tolist()
                    targets += part.targets[own].tolist()
                own = slice(*batch.cu_seqlens[response : response + 2].tolist())
                assert rows == batch.rows[own].tolist()
                assert targets == batch.targets[own].tolist()


def test_a_padded_batch_is_not_split():
    with pytest.raises(ValueError, match="padded batch .* parallel.context=1, or packing=true"):
        split_batch(collate([], packed=False), Group(0, 2))


# ---- what is refused ----------------------------------------------------------------------------


def test_parts_of_responses_need_their_whole_lengths():
    p = problem(lengths=(3, 2), feedback=Feedback.pairs([0], [1]))
    given = (p.hidden, p.weight, p.targets, [0, 5, 5], p.feedback)
    others = reference(p, "cached") | {"objective": Objective(), "group": Group(0, 2)}
    with pytest.raises(ValueError, match="in parts on 2 ranks: give lengths="):
        linear_una_loss(*given, **others)
    for lengths, message in {
        (5, 0): r"response 1 is empty \(lengths\[1\] = 0\)",
        (4, 1): r"response 0 has 5 rows on this rank, and lengths\[0\] = 4",
        (5,): "lengths has 1 numbers for 2 responses",
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_una_loss(*given, **others, lengths=lengths)
    with pytest.raises(ValueError, match="response 1 is empty"):
        linear_una_loss(*given, **reference(p, "cached"))


def test_a_plan_of_a_group_is_one_component():
    """Coefficients of all responses become known together; short parts stream beside long ones."""
    size = HeadSize(101, 4)
    feedback = Feedback.pairs([0, 2], [1, 3])
    options = {"budget": 20 * 500, "accumulator_width": 4, "length_normalize": True}
    plan = make_plan(feedback, [9, 0, 0, 40], size, whole_lengths=[9, 30, 5, 40], **options)
    (component,) = plan.streamed
    assert component.responses == (0, 3)
    assert [group.factors for group in component.groups] == [(1 / 9,), (-1 / 40,)]
    assert plan.unscored == () and not plan.resident


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma3TextConfig", "GptOssConfig", "OPTConfig"])
def test_the_probe_allows(name):
    if name in UNPACKED:
        pytest.skip("is padded in this version of transformers")
    model = build(name)
    state = torch.get_rng_state()
    assert split_refusal(model, 2) is None
    assert torch.get_rng_state().equal(state)


def test_the_probe_sees_a_model_that_looks_at_the_row(monkeypatch):
    """Such as by the number of its tokens, in some scale."""
    model = build("LlamaConfig")
    kind = type(model.get_decoder().layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * x.shape[1] ** 0.1)
    assert "other hidden states with split tokens" in split_refusal(model, 2)

    def failing(self, x):
        raise RuntimeError("no such row")

    monkeypatch.setattr(kind, "forward", failing)
    assert "failed with RuntimeError: no such row" in split_refusal(model, 2)


REFUSALS = {
    "packing": ({"packing": False}, {}, "packing=false pads .*packing=true"),
    "heads": ({"parallel": {"context": 3}}, {}, r"4 query heads .*4 / 3 = 1.333.*context=1"),
    "rope": (
        {},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "LlamaForCausalLM has rotary positions of type dynamic, .*context=1",
    ),
    "a model that is padded": ({}, None, "StableLm.*context=1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_loading(tmp_path, name):
    settings, changes, message = REFUSALS[name]
    if changes is None:
        build("StableLmConfig").save_pretrained(tmp_path)
    else:
        model = build("LlamaConfig")
        model.config.update(changes)
        model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = make_config(str(tmp_path), ["x.jsonl"], tmp_path / "out", **SPLIT | settings)
    assert isinstance(config.parallel, ParallelOptions)
    with pytest.raises(ValueError, match=f"parallel.context=. splits packed rows .*{message}"):
        find_facts(config, [], device="cpu", ranks=2)


def test_rows_stay_whole_without_a_group():
    ids, _, segments, _ = packed_row()
    assert padded_segments(segments, ids.shape[1], padded_tokens(ids.shape[1], 1)) == segments
