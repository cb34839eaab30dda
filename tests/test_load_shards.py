"""A rank reads its own rows of the weights: the rows that it would have of a whole model."""

from __future__ import annotations

import ctypes
import gc
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, REFUSED, build
from ranks import needs_sharded_integers
from una_fast.counters import LiveBytes
from una_fast.distributed import World, local_rows, shard
from una_fast.logs import say_once
from una_fast.model import nf4, sharded_export, sharded_loading
from una_fast.model.activations import decoder_layers, find_mlps
from una_fast.model.directory import INDEX, WEIGHTS
from una_fast.model.four_bits import packed_layers
from una_fast.model.policy import Policy, load_policy
from una_fast.model.settings import LoraOptions
from una_fast.model.sharded_export import gather_part, remove_other_weights
from una_fast.model.sharded_loading import read_shards
from una_fast.train import saver

LORA = LoraOptions(r=4, alpha=8)
CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt: larger pieces go back to the system when freed
# Number of ranks -> the rank to be. The last of 2 and of 5 has fewer rows of some weights, and 32
# rows leave many of 64 ranks without any. torch remembers the rank of a mesh of a size.
RANK = {2: 1, 3: 0, 4: 1, 5: 4, 64: 40}
SIZES = [2, 3, 5, 64]
# Stored expert by expert, and computed with as one tensor.
CONVERTED = {"Qwen3NextConfig"}


class OneOfMany(World):
    """A rank whose neighbours are not there: loading asks them for faults alone."""

    def gather(self, value):
        return [value]


@contextmanager
def one_of(size: int) -> Iterator[World]:
    """Be a rank of some, in this process: collectives do nothing."""
    rank = RANK[size]
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield OneOfMany(rank, size, CPU)
    finally:
        dist.destroy_process_group()


def load_shards(world: World, path, **options) -> Policy:
    """Load a model in shards."""
    policy = load_policy(path, in_shards=True, **options)
    assert policy.unread is not None, "loaded whole"
    place(policy, world, options["dtype"])
    return policy


def place(policy: Policy, world: World, dtype: torch.dtype) -> None:
    shard(policy.causal_lm, decoder_layers(policy.causal_lm), world, dtype)
    if policy.unread is not None:
        read_shards(policy.causal_lm, policy.unread, world)


def assert_rows_of(policy: Policy, whole: Policy, world: World) -> None:
    """Compare every parameter and buffer with those of a whole model."""
    expected = dict(whole.causal_lm.named_parameters(remove_duplicate=False))
    found = dict(policy.causal_lm.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        of_all = expected[name]
        size = -(-len(of_all) // world.size)
        rows = of_all[world.rank * size : (world.rank + 1) * size]
        local, _ = local_rows(parameter)
        assert local.dtype == rows.dtype and local.shape == rows.shape, name
        assert torch.equal(local, rows), name
        assert parameter.requires_grad == of_all.requires_grad, name
    ties = {name: id(p) for name, p in found.items()}
    assert len(set(ties.values())) == len({id(p) for p in expected.values()}), "tied as before"
    buffers = dict(whole.causal_lm.named_buffers())
    for name, buffer in policy.causal_lm.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype, name
    assert len(buffers) == len(dict(policy.causal_lm.named_buffers()))
    assert policy.head.softcap == whole.head.softcap
    assert policy.head.logit_scale == whole.head.logit_scale
    settings = [m.config.to_dict() for m in (policy.causal_lm, whole.causal_lm)]
    assert settings[0] == settings[1]
    generation = [m.generation_config for m in (policy.causal_lm, whole.causal_lm)]
    assert [g and g.to_dict() for g in generation[:1]] == [
        g and g.to_dict() for g in generation[1:]
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> directory of the saved model"""
    made = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
            build(family).save_pretrained(made[family])
        return made[family]

    return get


def copy_of(directory: Path, target: Path, change) -> Path:
    """Copy a model with changed weights: change(state dict) changes in place."""
    target.mkdir(exist_ok=True)
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


# ---- the rows ----


@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_every_rank_has_the_rows_of_a_whole_model(saved, family):
    """Uneven and empty shards, tied weights, buffers that are saved, and that are computed."""
    try:
        whole = load_policy(saved(family), dtype=torch.float32)
    except ValueError:
        pytest.skip("cannot be scored")
    for size in SIZES:
        with one_of(size) as world:
            policy = load_policy(saved(family), dtype=torch.float32, in_shards=True)
            assert (policy.unread is None) == (family in CONVERTED)
            place(policy, world, torch.float32)
            assert_rows_of(policy, whole, world)


@pytest.mark.parametrize("at_once", [1, 1000, 2**26])
def test_rows_are_converted_portion_by_portion(saved, monkeypatch, at_once):
    """bfloat16 of float32, in any portions: as of a whole model."""
    monkeypatch.setattr(sharded_loading, "ROWS_AT_ONCE", at_once)
    whole = load_policy(saved("Gemma2Config"), dtype=torch.bfloat16)
    with one_of(3) as world:
        policy = load_shards(world, saved("Gemma2Config"), dtype=torch.bfloat16)
        assert_rows_of(policy, whole, world)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_numbers_of_a_whole_model(saved, dtype):
    """The same random numbers are drawn, and no others: the stream goes on alike."""
    path = saved("LlamaConfig")
    torch.manual_seed(7)
    whole = load_policy(path, dtype=dtype, lora=LORA)
    after = torch.get_rng_state()
    for size in SIZES:
        with one_of(size) as world:
            torch.manual_seed(7)
            policy = load_shards(world, path, dtype=dtype, lora=LORA)
            assert torch.equal(torch.get_rng_state(), after)
            assert_rows_of(policy, whole, world)
            assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}


def test_an_adapter_directory_is_read_over_shards(saved, tmp_path):
    policy = load_policy(saved("LlamaConfig"), dtype=torch.float32, lora=LORA)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy.model.save_pretrained(tmp_path)
    whole = load_policy(tmp_path, dtype=torch.float32)
    with one_of(3) as world:
        policy = load_shards(world, tmp_path, dtype=torch.float32)
        assert_rows_of(policy, whole, world)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(saved, tmp_path, equal):
    """Are tied if their numbers are equal, and stay two weights if not."""

    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][-1, -1] += 0.0 if equal else 1.0

    path = copy_of(saved("LlamaConfig tied"), tmp_path / "twice", change)
    whole = load_policy(path, dtype=torch.float32)
    with one_of(2) as world:
        policy = load_shards(world, path, dtype=torch.float32)
        assert_rows_of(policy, whole, world)
        tied = policy.head.weight is policy.causal_lm.get_input_embeddings().weight
        assert tied == equal


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_are_found_without_the_numbers(family):
    """By trying random numbers; some families have an MLP, some none, of each kind of layer."""
    model = build(family)
    names = {module: name for name, module in model.named_modules()}
    expected = [names[module] for module in find_mlps(model)]
    outline = build(family).to("meta")
    names = {module: name for name, module in outline.named_modules()}
    assert [names[module] for module in find_mlps(outline)] == expected
    assert all(parameter.is_meta for parameter in outline.parameters())


def test_several_files_are_read(saved, tmp_path):
    build("LlamaConfig").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = load_policy(tmp_path, dtype=torch.float32)
    with one_of(2) as world:
        assert_rows_of(load_shards(world, tmp_path, dtype=torch.float32), whole, world)


# ---- refused, or loaded whole ----

DAMAGES = {
    "lacks weights: model.norm.weight": lambda w: w.pop("model.norm.weight"),
    "no place for: model.layers.9.x.weight": lambda w: w.update(
        {"model.layers.9.x.weight": torch.ones(3)}
    ),
    "model.norm.weight is [31] and must be [32]": lambda w: w.update(
        {"model.norm.weight": torch.ones(31)}
    ),
    "the weight model.layers.1.mlp.up_proj.weight has numbers that are not finite": lambda w: w[
        "model.layers.1.mlp.up_proj.weight"
    ][-1].fill_(float("nan")),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_refused_by_name(saved, tmp_path, message):
    """In the words of a whole model; the last rows are those of the second rank."""
    path = copy_of(saved("LlamaConfig"), tmp_path / "damaged", DAMAGES[message])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_policy(path, dtype=torch.float32)
    with one_of(2) as world, pytest.raises(ValueError, match=re.escape(message)):
        load_shards(world, path, dtype=torch.float32)


def test_a_fault_of_one_rank_is_raised_on_all(saved):
    """Or else the others would wait for ever."""

    class Second(OneOfMany):
        def gather(self, value):
            return [value, "weights.safetensors is damaged"]

    with one_of(2), pytest.raises(ValueError, match="weights.safetensors is damaged"):
        load_shards(Second(1, 2, CPU), saved("LlamaConfig"), dtype=torch.float32)


def test_weights_that_are_converted_are_loaded_whole(saved, tmp_path, monkeypatch, caplog):
    """One line says so, and the adapters have the numbers that they would have had."""
    path = saved("LlamaConfig")
    torch.manual_seed(7)
    whole = load_policy(path, dtype=torch.float32, lora=LORA)

    def no_copy(*_):
        raise sharded_loading.NotInShards("for a test")

    monkeypatch.setattr("una_fast.model.policy.check_unread", no_copy)
    say_once.cache_clear()
    torch.manual_seed(7)
    with one_of(2) as world, caplog.at_level(logging.INFO):
        policy = load_policy(path, dtype=torch.float32, lora=LORA, in_shards=True)
        assert policy.unread is None
        place(policy, world, torch.float32)
        assert_rows_of(policy, whole, world)
    lines = [r.getMessage() for r in caplog.records if "before it is sharded" in r.getMessage()]
    assert lines == [f"{path}: every rank loads the whole model before it is sharded: for a test"]


# ---- memory ----


class HeldBytes(LiveBytes):
    """Storages with memory: those of the meta device have none."""

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._born(storage)


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """Sample the memory of this process that no file backs; yields [bytes above the start].

    A busy machine may give the sampling thread no turn: what is held at the end is always seen.
    """

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    # Freed memory that stays with the process would be taken again, and not be seen.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    gc.collect()
    libc.malloc_trim(0)
    done = threading.Event()
    start, peak = now(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], now() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
        peak[0] = max(peak[0], now() - start)
    finally:
        done.set()
        thread.join()
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # as after many large tensors


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Save a Llama of 100 MB, stored in bfloat16 as most are."""
    directory = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_no_rank_holds_the_whole_model(large, lora, monkeypatch):
    """At load: 1.15 of the shard and a layer, of tensors and of the memory of the process."""
    monkeypatch.setattr(sharded_loading, "ROWS_AT_ONCE", 2**20)
    options = {"dtype": torch.float32, "lora": lora}
    load_shards_warm(large, options)
    with one_of(4) as world:
        with HeldBytes() as held, resident_peak() as resident:
            policy = load_shards(world, large, **options)
        own = sum(bytes_of(local_rows(p)[0]) for p in policy.causal_lm.parameters())
        layer = sum(map(bytes_of, policy.causal_lm.model.layers[0].parameters()))
        bound = 1.15 * own + layer
        assert held.live() >= own, "every shard is counted"
        assert held.peak() <= bound
        assert resident[0] <= bound
        del policy
    with resident_peak() as resident:
        policy = load_policy(large, **options)
    assert resident[0] > 1.5 * bound, "a whole model is seen"
    del policy


@needs_sharded_integers
def test_no_rank_holds_the_whole_model_to_pack_it(large, monkeypatch):
    """At 4 bits: the shard is of packed rows, and so is the layer in the bound."""
    monkeypatch.setattr(sharded_loading, "ROWS_AT_ONCE", 2**16)
    monkeypatch.setattr(nf4, "NUMBERS_AT_ONCE", 2**15)
    options = {"dtype": torch.bfloat16, "lora": LORA, "quantize_base": "nf4"}
    whole = load_policy(large, **options)
    with one_of(4) as world:
        with HeldBytes() as held:
            policy = load_shards(world, large, **options)
        own = sum(bytes_of(local_rows(p)[0]) for p in policy.causal_lm.parameters())
        layer = policy.causal_lm.model.layers[0]
        assert held.live() >= own, "every shard is counted"
        assert held.peak() <= 1.15 * own + sum(map(bytes_of, layer.parameters()))
        packed = [one.weight for _, one in packed_layers(policy.causal_lm)]
        nbytes = sum(local_rows(weight)[0].nbytes for weight in packed)
        numbers = sum(one.in_features * one.out_features for _, one in packed_layers(whole.model))
        assert nbytes == 4.5 / 8 * numbers / 4


@needs_sharded_integers
@pytest.mark.parametrize("family", ["LlamaConfig tied", "MiniCPM3Config", "OPTConfig", *CONVERTED])
def test_packed_rows_are_those_of_a_whole_model(saved, family):
    """At 4 bits, of uneven and empty shards."""
    options = {"dtype": torch.float32, "lora": LORA, "quantize_base": "nf4"}
    path = saved(family)
    torch.manual_seed(7)
    whole = load_policy(path, **options)
    for size in SIZES:
        with one_of(size) as world:
            torch.manual_seed(7)
            policy = load_policy(path, in_shards=True, **options)
            assert (policy.unread is None) == (family in CONVERTED)
            place(policy, world, torch.float32)
            assert_rows_of(policy, whole, world)
            packed = {name for name, _ in packed_layers(policy.causal_lm)}
            assert packed == {name for name, _ in packed_layers(whole.causal_lm)}


@needs_sharded_integers
def test_numbers_that_are_not_finite_are_refused_before_they_are_packed(saved, tmp_path):
    damage = DAMAGES[list(DAMAGES)[-1]]
    path = copy_of(saved("LlamaConfig"), tmp_path / "damaged", damage)
    options = {"dtype": torch.float32, "lora": LORA, "quantize_base": "nf4"}
    message = "up_proj.weight has numbers that are not finite"
    with pytest.raises(ValueError, match=message):
        load_policy(path, **options)
    with one_of(2) as world, pytest.raises(ValueError, match=message):
        load_shards(world, path, **options)


def test_no_rank_gathers_the_whole_model(large, monkeypatch):
    """To save: the weights in the files of a rank, and a weight on the way, gathered and padded."""
    monkeypatch.setattr(sharded_export, "FILE_BYTES", 4 * 2**20)
    with one_of(4) as world:
        policy = load_shards(world, large, dtype=torch.float32)
        with HeldBytes() as held:
            part = gather_part(policy, world)
        weights = list(map(bytes_of, policy.causal_lm.parameters()))
        own = sum(map(bytes_of, part.tensors.values()))
        assert part.nbytes == sum(weights)
        assert 0.15 < own / part.nbytes < 0.35, "files go round"
        assert held.live() >= own, "every weight is counted"
        assert held.peak() <= own + 3 * max(weights)
        assert held.peak() < 0.55 * part.nbytes
        assert set(part.files) == set(load_file(large / "model.safetensors"))
        assert {part.files[name] for name in part.tensors} == part.own
        assert not part.own & part.others


@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_saved_names_are_those_of_one_process(saved, family, monkeypatch):
    """Tied weights once, buffers too; a model with converted weights is left to the main rank."""
    monkeypatch.setattr(sharded_export, "FILE_BYTES", 1000)
    try:
        policy = load_policy(saved(family), dtype=torch.float32, in_shards=True)
    except ValueError:
        pytest.skip("cannot be scored")
    stored = load_file(saved(family) / "model.safetensors")
    with one_of(3) as world:
        place(policy, world, torch.float32)
        part = gather_part(policy, world)
        assert (part is None) == (family in CONVERTED)
        if part is not None:
            assert set(part.files) == set(stored)
            for name, tensor in part.tensors.items():
                assert tensor.shape == stored[name].shape, name


def test_a_rank_that_cannot_write_stops_all():
    """The words of another rank, as of a disk; an error of this rank as it is."""

    class Second(OneOfMany):
        def gather(self, value):
            return [value, "no space"]

    world, seen = Second(0, 2, CPU), []

    def refused(error: Exception) -> Exception:
        seen.append(str(error))
        return error

    with pytest.raises(OSError, match="no space"):
        saver._write_part(lambda: None, world, refused)

    def diverged() -> None:
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        saver._write_part(diverged, OneOfMany(0, 1, CPU), refused)
    assert seen == ["no space", "not finite"]


def test_files_of_an_earlier_model_do_not_stay(tmp_path):
    """transformers reads a single file, if there is one, and not the index beside it."""
    names = [WEIGHTS, INDEX, "model-00001-of-00002.safetensors", "adapter_model.safetensors"]
    for name in names:
        (tmp_path / name).write_text("")
    remove_other_weights(tmp_path, {"adapter_model.safetensors"})
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    remove_other_weights(tmp_path, {INDEX, "model-00001-of-00002.safetensors"})
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {WEIGHTS}
    (tmp_path / WEIGHTS).write_text("")
    remove_other_weights(tmp_path, {WEIGHTS})
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "adapter_model.safetensors"}


def load_shards_warm(path, options) -> None:
    """Load once, so that modules and caches of a first load do not count."""
    with one_of(4) as world:
        load_shards(world, path, **options)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
