"""A rank among ranks that are not there, to trace a step of a sharded run in one process.

The rank has torch's process groups, made of the backend "fake": collectives take and give tensors,
and send nothing. FSDP2 then shards, gathers and reduces as in the run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from una_fast.distributed import World, lay_out
from una_fast.parallel import ParallelOptions


@contextmanager
def planned_rank(ranks: int, parallel: ParallelOptions | None, place: int = 0) -> Iterator[World]:
    """Be one of some ranks inside the block, laid out as a run lays them out.

    ranks: of the planned run
    parallel: settings of the planned run; None: all ranks shard
    place: of the rank in the first context group

    The first ranks hold the largest shards. A process group that is there already, of a run under
    torchrun, waits outside.
    """
    state = c10d._world
    real, count, excepthook = state.default_pg, state.group_count, sys.excepthook
    before = set(state.pg_map)
    c10d._update_default_pg(None)
    try:
        dist.init_process_group("fake", rank=place, world_size=ranks)
        yield lay_out(World(place, ranks, torch.device("cpu")), parallel)
    finally:
        c10d._update_default_pg(real)
        for group in set(state.pg_map) - before:
            dist.destroy_process_group(group)
        # Names of groups are counted, and all real ranks must count alike.
        state.group_count = count
        sys.excepthook = excepthook
