"""Threads that run whole blocks of rows."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from una_fast import Feedback, linear_una_loss
from una_fast.counters import FlopCounter, LiveBytes
from una_fast.head import torch_engine
from una_fast.head.threads import share
from una_fast.head.torch_engine import LogitTransform, one_read_, row_grad_, row_logps

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3])
def threads(request, monkeypatch):
    """Give operations several threads, and cut rows into small blocks."""
    monkeypatch.setattr(torch_engine, "CACHE_BLOCK_BYTES", 1 << 12)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def row_operations(transform):
    """Return the results of every row operation on the same 61 rows of 400 logits."""
    torch.manual_seed(0)
    u, bias, coef = 5 * torch.randn(61, 400), torch.randn(400), torch.randn(61)
    targets = torch.randint(400, (61,))
    lse, target_logit = row_logps(u, targets, transform, bias)
    du = row_grad_(u.clone(), targets, coef, lse, transform, bias)
    return [lse, target_logit, du, *one_read_(u.clone(), targets, transform, bias)]


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=3.0)])
@pytest.mark.parametrize("inference", [False, True])
def test_rows_are_the_same_on_any_number_of_threads(threads, transform, inference):
    with torch.inference_mode(inference):
        several = row_operations(transform)
    torch.set_num_threads(1)
    for found, alone in zip(several, row_operations(transform), strict=True):
        assert torch.equal(found, alone)


def test_blocks_are_shared_among_threads_of_one_core_each(threads):
    """Every item waits for the others: one thread alone would never get past the first."""
    meeting = threading.Barrier(threads)
    seen = {}

    def work(item):
        meeting.wait(timeout=60)
        seen[item] = threading.get_ident(), torch.get_num_threads()

    share(work, range(threads), CPU)
    assert sorted(seen) == list(range(threads))
    assert {cores for _, cores in seen.values()} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen.values()}
    # The caller, and threads that begin later (autograd's are among them), have what they had.
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == threads
    before = threading.active_count()
    share(lambda item: None, range(50), CPU)
    assert threading.active_count() == before


def test_an_error_is_raised_when_all_threads_have_stopped(threads):
    done = []

    def work(item):
        if item == 1:
            raise ValueError("item 1")
        done.append(item)

    with pytest.raises(ValueError, match="item 1"):
        share(work, range(20), CPU)
    found = len(done)
    share(lambda item: None, range(20), CPU)
    assert len(done) == found


def test_callers_on_several_threads(threads):
    results = []

    def caller():
        torch.set_num_threads(threads)
        u = 5 * torch.randn(61, 400, generator=torch.Generator().manual_seed(1))
        results.append((u, row_logps(u, torch.zeros(61, dtype=torch.long), LogitTransform())[0]))

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert len(results) == 4
    for u, lse in results:
        torch.testing.assert_close(lse, u.logsumexp(1))


def loss_of(weight):
    torch.manual_seed(1)
    hidden, targets = torch.randn(40, 8, requires_grad=True), torch.randint(400, (40,))
    cu_seqlens = torch.tensor([0, 25, 40])
    feedback = Feedback.pairs([0], [1])
    out = linear_una_loss(
        hidden, weight, targets, cu_seqlens, feedback, ref_logps=torch.tensor([-9.0, -8.0])
    )
    out.loss.backward()
    return out.loss.detach(), hidden.grad


def test_modes_count_the_operations_of_all_blocks(threads):
    weight = torch.randn(400, 8)
    torch.set_num_threads(1)
    with FlopCounter() as flop, LiveBytes() as memory:
        loss_of(weight)
    torch.set_num_threads(threads)
    with FlopCounter() as flop_of_several, LiveBytes() as memory_of_several:
        loss_of(weight)
    assert flop.flop == flop_of_several.flop > 0
    assert memory.sizes == memory_of_several.sizes


def test_a_forked_process_starts_threads_of_its_own(threads):
    share(lambda item: None, range(threads), CPU)
    child = os.fork()
    if child == 0:
        seen = set()
        meeting = threading.Barrier(threads)

        def work(item):
            meeting.wait(timeout=30)
            seen.add(item)

        try:
            share(work, range(threads), CPU)
        finally:
            os._exit(0 if len(seen) == threads else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
