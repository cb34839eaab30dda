"""Compile every kernel for GPUs that need not be there; write registers, spills and shared memory.

    python bench/kernels_compile.py            rewrites the table of the installed Triton (minutes)
    python bench/kernels_compile.py --subset   prints the rows that the tests compare, as JSON

The table of the pinned Triton is bench/results/kernels_compile.json, that of another, 3.6 say,
kernels_compile_triton3.6.json beside it. A row is "kernel | dtypes | flags | target":

    registers      per thread
    spills         bytes of stack on NVIDIA (no stack, no spill), spilled registers on AMD
    shared         bytes of shared memory per program
    programs       that fit on a multiprocessor at once, by registers, shared memory and threads
    barrier        kernels that may write over their input: whether every store of the gradient has
                   a barrier between itself and the load before
    instructions   NVIDIA: of the body, as they stand in the program, executed or not. The body is
                   the loop over whole blocks of a row, without loops inside it (a rescaling that
                   few rows need); in kernels without such a loop, the whole program
    per_logit      instructions of the body per logit that a thread treats in it
    loads, stores  global accesses of the body, "2x128 1x32": number x bits per thread; "tma": a
                   tile at a time
    spills_in_body instructions of the body that move spilled numbers; only where there are spills

Triton compiles a launch anew for properties of the arguments. A row without a flag of this kind is
the launch of an odd vocabulary. "aligned": all pointers and numbers are multiples of 16.
"unaligned": no pointer or number is. "one": all numbers are 1, and become constants. "small" (AMD):
all tensors lie within 2 GiB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the compiler, not the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from una_fast.kernels import (
    adamw,
    gather,
    gemm,
    logp_partials,
    one_read,
    row_stats,
    rowgrad,
    scale,
    una_loss,
)

RESULTS = Path(__file__).parent / "results"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
FLAGS = [(), ("bias",), ("softcap",), ("bias", "softcap")]
SPECIALISED = re.compile(
    r"(row_logps \| fp32|(row_grad|one_read) \| fp32->bf16) \| (bf16 bias softcap|-)$"
    r"|(row_sums \| fp32|entropy_grad \| fp32->bf16) \| -$"
    r"|gather.* \| -$"
    r"|(linear_logps|mm) \| (bf16|fp32) \| (-|tma|bias softcap|\w+ x \w+ \+=)$"
    r"|merge"
    r"|segment"
    r"|unit \| \w+ \| linear"
    r"|(scale \| fp32->bf16|adamw \| \w+) \| -$"
)
SUBSET = re.compile(
    r"row_grad \| fp32->bf16 \| fp16 bias softcap \|"
    r"|one_read \| fp32->bf16 \| (one|small) "
    r"|row_logps \| fp32 \| softcap "
    r"|row_sums \| fp32 \| fp32 bias softcap \| (sm_90|gfx)"
    r"|entropy_grad \| fp32->bf16 \| softcap \| (sm_90|gfx)"
    r"|gather_backward \| bf16 \| unaligned \| (sm_80|sm_90|gfx)"
    r"|linear_logps \| fp16 \| bias \| (sm_80|gfx)"
    r"|linear_logps \| bf16 \| tma \| sm_90"
    r"|linear_logps \| bf16 \| bias softcap aligned \| sm_100"
    r"|linear_logps \| fp32 \| - \| sm_80"
    r"|mm \| bf16 \| col x row \+= \|"
    r"|merge \| fp32 \| - "
    r"|segment \| fp32 \| - "
    r"|unit \| i64 \| squared"
    r"|scale \| fp32->bf16 \| - "
    r"|adamw \| bf16 \| - "
)
# Shared memory of a multiprocessor in bytes, of which NVIDIA keeps 1 KiB per program
SHARED = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472, "gfx942": 65_536}
WIDTHS = ("tma", "256", "128", "64", "32", "16", "8")  # bits of an access
COMPILER_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Variant:
    """A launch of a kernel, as far as the compiler tells launches apart.

    types: Triton types of the arguments that are neither constexpr nor None
    constants: values of the constexpr arguments
    aligned: names of the arguments that are multiples of 16
    options: compiler options
    unaligned: launch arguments that differ where numbers are no multiples of 16
    overwrites: whether the kernel stores over its input
    small: whether the tensors are known to lie within 2 GiB
    block: number of logits that a program treats at once, of a kernel that walks rows
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: dict[str, Any] = field(default_factory=dict)
    overwrites: bool = False
    small: bool = False
    block: int | None = None


def pointers(types: dict[str, str]) -> tuple[str, ...]:
    """Return the names of the pointer arguments."""
    return tuple(name for name, kind in types.items() if kind.startswith("*"))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return launch arguments as (constexprs, compiler options)."""
    constants = {k: v for k, v in options.items() if k not in COMPILER_OPTIONS}
    return constants, {k: v for k, v in options.items() if k in COMPILER_OPTIONS}


def row_variants() -> list[Variant]:
    """Return row_logps, row_grad and one_read by dtypes, bias and softcap."""
    usual, *wider = rowgrad.BLOCKS
    biases = (None, *DTYPES)
    softcaps = (False, True)
    same = list(zip(DTYPES, DTYPES, strict=True))
    narrowing = [("fp32", "bf16"), ("fp32", "fp16")]
    found = []
    for logps, grad in ((True, False), (False, True)):
        outputs = {"logps": logps, "grad": grad}
        pairs = same + narrowing if grad else same
        for (u, du), bias, softcap in itertools.product(pairs, biases, softcaps):
            found.append(row_variant(u, du, bias, softcap, usual, **outputs))
        for blocks in wider:
            found.append(row_variant("fp32", "bf16", None, False, blocks, **outputs))
    blocks_of_one_read = (one_read.LAUNCH["BLOCK"], one_read.LAUNCH["num_warps"])
    wide = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
    for (u, e), bias, softcap in itertools.product(wide, biases, softcaps):
        found.append(one_read_variant(u, e, bias, softcap, blocks_of_one_read))
    for blocks in rowgrad.BLOCKS:
        if blocks != blocks_of_one_read:
            found.append(one_read_variant("fp32", "bf16", None, False, blocks))
    return found


def one_read_variant(
    u: str, e: str, bias: str | None, softcap: bool, blocks: tuple[int, int]
) -> Variant:
    """Return a launch of one_read_kernel; parameters as of `row_variant`."""
    types = {"u_ptr": f"*{u}", "e_ptr": f"*{e}", "targets_ptr": "*i64"}
    types |= {"logp_ptr": "*fp32", "factor_ptr": "*fp32"}
    if bias:
        types["bias_ptr"] = f"*{bias}"
    aligned = (*pointers(types), "u_stride", "e_stride")
    types |= dict.fromkeys(("u_stride", "e_stride", "width"), "i32")
    types |= dict.fromkeys(("inner", "outer", "slope_of_all"), "fp32")
    block, options = split({**rowgrad.LAUNCH, "BLOCK": blocks[0], "num_warps": blocks[1]})
    flags = {"HAS_BIAS": bool(bias), "HAS_SOFTCAP": softcap}
    return Variant(
        f"one_read | {u}->{e} | {_words(bias, softcap, blocks, one_read.LAUNCH)}",
        one_read.one_read_kernel,
        types,
        {**flags, **block},
        aligned,
        options,
        overwrites=True,
        block=block["BLOCK"],
    )


def _words(bias: str | None, softcap: bool, blocks: tuple[int, int], launch: dict[str, Any]) -> str:
    """Return what is unusual about a row kernel, for its name."""
    words = []
    if bias:
        words.append(f"{bias} bias")
    if softcap:
        words.append("softcap")
    if blocks != (launch["BLOCK"], launch["num_warps"]):
        words.append("{}x{}".format(*blocks))
    return " ".join(words) or "-"


def row_variant(
    u: str,
    du: str,
    bias: str | None,
    softcap: bool,
    blocks: tuple[int, int],
    *,
    logps: bool,
    grad: bool,
) -> Variant:
    """Return a launch of rows_kernel.

    u, du, bias: dtypes; bias is None without a bias
    blocks: (BLOCK, num_warps)
    logps, grad: outputs of the launch
    """
    types = {
        "u_ptr": f"*{u}",
        "targets_ptr": "*i64",
        "lse_ptr": "*fp32",
    }
    if grad:
        types["du_ptr"] = f"*{du}"
        types["coef_ptr"] = "*fp32"
    if logps:
        types["target_logit_ptr"] = "*fp32"
    if bias:
        types["bias_ptr"] = f"*{bias}"
    aligned = (*pointers(types), "u_stride", "du_stride")
    types |= dict.fromkeys(("u_stride", "du_stride", "start", "width"), "i32")
    types |= dict.fromkeys(("inner", "outer"), "fp32")
    block, options = split({**rowgrad.LAUNCH, "BLOCK": blocks[0], "num_warps": blocks[1]})
    flags = {
        "HAS_BIAS": bool(bias),
        "HAS_SOFTCAP": softcap,
        "LOGPS": logps,
        "GRAD": grad,
    }
    name = "_".join(["row"] + ["logps"] * logps + ["grad"] * grad)
    dtypes = f"{u}->{du}" if grad else u
    return Variant(
        f"{name} | {dtypes} | {_words(bias, softcap, blocks, rowgrad.LAUNCH)}",
        rowgrad.rows_kernel,
        types,
        {**flags, **block},
        aligned,
        options,
        overwrites=grad,
        block=block["BLOCK"],
    )


def stats_variants() -> list[Variant]:
    """Return row_sums with all sums, or one, and entropy_grad, by dtypes, bias and softcap."""
    sums = {"MOMENT": "moment", "SQUARES": "squares", "PLAIN": "plain", "PLACE": "place"}
    found = []
    softcaps = (False, True)
    for bias, softcap in itertools.product((None, "fp32"), softcaps):
        found.append(row_sums_variant(bias, softcap, sums))
    for bias, softcap in itertools.product((None, *DTYPES), softcaps):
        found += [entropy_grad_variant(du, bias, softcap) for du in ("fp32", "bf16")]
    found += [row_sums_variant(None, False, {flag: name}) for flag, name in sums.items()]
    return found


def row_sums_variant(bias: str | None, softcap: bool, sums: dict[str, str]) -> Variant:
    """Return a launch of row_sums_kernel on float32 logits.

    bias: "fp32", or None
    softcap: whether there is one
    sums: flag -> name of the wanted sums
    """
    types = {"u_ptr": "*fp32", "targets_ptr": "*i64"}
    types |= dict.fromkeys(("top_ptr", "total_ptr", "target_logit_ptr"), "*fp32")
    for name in sums.values():
        types[f"{name}_ptr"] = "*i64" if name == "place" else "*fp32"
    if bias:
        types["bias_ptr"] = f"*{bias}"
    aligned = (*pointers(types), "u_stride")
    types |= dict.fromkeys(("u_stride", "start", "width"), "i32")
    types |= dict.fromkeys(("inner", "outer"), "fp32")
    block, options = split(row_stats.LAUNCH)
    flags = {"HAS_BIAS": bool(bias), "HAS_SOFTCAP": softcap}
    flags |= {name.upper(): name in sums.values() for name in row_stats.SUMS}
    usual = (row_stats.LAUNCH["BLOCK"], row_stats.LAUNCH["num_warps"])
    words = _words(bias, softcap, usual, row_stats.LAUNCH)
    if len(sums) == 1:
        words = f"{next(iter(sums.values()))} alone"
    return Variant(
        f"row_sums | fp32 | {words}",
        row_stats.row_sums_kernel,
        types,
        {**flags, **block},
        aligned,
        options,
        block=block["BLOCK"],
    )


def entropy_grad_variant(du: str, bias: str | None, softcap: bool) -> Variant:
    """Return a launch of entropy_grad_kernel on float32 logits; parameters as of `row_variant`."""
    types = {"u_ptr": "*fp32", "du_ptr": f"*{du}", "targets_ptr": "*i64"}
    types |= {f"{name}_ptr": "*fp32" for name in ("coef", "upstream", "entropy", "lse", "tail")}
    if bias:
        types["bias_ptr"] = f"*{bias}"
    aligned = (*pointers(types), "u_stride", "du_stride")
    types |= dict.fromkeys(("u_stride", "du_stride", "start", "width"), "i32")
    types |= dict.fromkeys(("inner", "outer"), "fp32")
    block, options = split(row_stats.LAUNCH)
    usual = (row_stats.LAUNCH["BLOCK"], row_stats.LAUNCH["num_warps"])
    return Variant(
        f"entropy_grad | fp32->{du} | {_words(bias, softcap, usual, row_stats.LAUNCH)}",
        row_stats.entropy_grad_kernel,
        types,
        {"HAS_BIAS": bool(bias), "HAS_SOFTCAP": softcap, **block},
        aligned,
        options,
        overwrites=True,
        block=block["BLOCK"],
    )


def gather_variants() -> list[Variant]:
    """Return the gather kernels in all dtypes."""
    block, options = split(rowgrad.LAUNCH)
    logits = block["BLOCK"]
    found = []
    for dtype in DTYPES:
        shared = {
            "logits_ptr": f"*{dtype}",
            "targets_ptr": "*i64",
            "lse_ptr": "*fp32",
            "logits_stride": "i32",
            "width": "i32",
            "inverse_temperature": "fp32",
        }
        types = {
            **shared,
            "logps_ptr": "*fp32",
        }
        aligned = (*pointers(types), "logits_stride")
        label = f"gather | {dtype} | -"
        kernel = gather.gather_kernel
        found.append(Variant(label, kernel, types, block, aligned, options, block=logits))
        types = {
            **shared,
            "grad_ptr": f"*{dtype}",
            "upstream_ptr": "*fp32",
            "grad_stride": "i32",
        }
        aligned = (*pointers(types), "logits_stride", "grad_stride")
        label = f"gather_backward | {dtype} | -"
        kernel = gather.gather_backward_kernel
        found.append(
            Variant(label, kernel, types, block, aligned, options, overwrites=True, block=logits)
        )
    return found


def linear_variants(arch: str) -> list[Variant]:
    """Return the fused linear kernel with the tiles of an architecture, and the merge kernel."""
    found = []
    for dtype in DTYPES:
        has_descriptors = dtype != "fp32" and arch in ("sm_90", "sm_100")
        for flags in FLAGS:
            # operands that fit no descriptor are loaded number by number
            found.append(
                linear_variant(arch, dtype, flags, tma=False, by_vectors=not has_descriptors)
            )
            if has_descriptors:
                found.append(linear_variant(arch, dtype, flags, tma=True))
    types = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "N": "i32", "vocab_tiles": "i32"}
    tiles = {"ROWS": logp_partials.MERGE_ROWS, "TILES": logp_partials.MERGE_TILES}
    kernel, options = logp_partials.merge_kernel, rowgrad.FUSED
    found.append(Variant("merge | fp32 | -", kernel, types, tiles, pointers(types), options))
    return found


def linear_variant(
    arch: str, dtype: str, flags: tuple[str, ...], *, tma: bool, by_vectors: bool = True
) -> Variant:
    """Return a launch of partials_kernel.

    arch, dtype: of the operands
    flags: "bias", "softcap"
    tma: whether operands come through tensor descriptors
    by_vectors: whether operands can be loaded 16 bytes at a time
    """
    operand = torch.float32 if dtype == "fp32" else torch.bfloat16
    tiling = logp_partials.tiling(arch, operand, by_vectors=by_vectors)
    by_number = logp_partials.tiling(arch, operand, by_vectors=False)
    if tma:
        types = {
            "hidden": f"tensordesc<{dtype}[{tiling.BM},{tiling.BK}]>",
            "weight": f"tensordesc<{dtype}[{tiling.BV},{tiling.BK}]>",
        }
    else:
        types = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
    types["targets_ptr"] = "*i64"
    types["partial_ptr"] = "*fp32"
    types["target_logit_ptr"] = "*fp32"
    if "bias" in flags:
        types["bias_ptr"] = f"*{dtype}"
    aligned = (*pointers(types), "hidden_stride", "weight_stride", "D")
    types |= dict.fromkeys(("hidden_stride", "weight_stride", "N", "V", "D"), "i32")
    types |= dict.fromkeys(("inner", "outer"), "fp32")
    tiles, options = split({**tiling._asdict(), **rowgrad.FUSED})
    constants = {
        "HAS_BIAS": "bias" in flags,
        "HAS_SOFTCAP": "softcap" in flags,
        "TMA": tma,
        **tiles,
    }
    words = [*flags, "tma"] if tma else flags
    return Variant(
        f"linear_logps | {dtype} | {' '.join(words) or '-'}",
        logp_partials.partials_kernel,
        types,
        constants,
        aligned,
        options,
        {} if tma else by_number._asdict(),
    )


def gemm_variants() -> list[Variant]:
    """Return the GEMM of the logits, of dH and of dW, written and accumulated."""
    # the strides that are 1
    layouts = {
        "row x col": ("a_col", "b_row"),
        "row x row": ("a_col", "b_col"),
        "col x row": ("a_row", "b_col"),
    }
    strides = ("a_row", "a_col", "b_row", "b_col", "out_row")
    tiles, options = split({**gemm.TILES, **rowgrad.FUSED})
    found = []
    for dtype, layout, accumulate in itertools.product(("bf16", "fp16"), layouts, (False, True)):
        ones = layouts[layout]
        others = [name for name in strides if name not in ones]
        types = {
            "a_ptr": f"*{dtype}",
            "b_ptr": f"*{dtype}",
            "out_ptr": "*fp32",
        }
        types |= dict.fromkeys(("M", "N", "K", *others), "i32")
        aligned = (*pointers(types), *others)
        constants = {**dict.fromkeys(ones, 1), "ACCUMULATE": accumulate, **tiles}
        label = f"mm | {dtype} | {layout}{' +=' if accumulate else ''}"
        found.append(
            Variant(label, gemm.mm_kernel, types, constants, aligned, options, gemm.SINGLES)
        )
    return found


def loss_variants() -> list[Variant]:
    """Return the sums over responses, and the loss kernel with every form in some variant."""
    types = {"tokens_ptr": "*fp32", "cu_ptr": "*i64", "sums_ptr": "*fp64"}
    options = {"num_warps": una_loss.TOKEN_WARPS, **rowgrad.FUSED}
    constants = {"BLOCK": una_loss.TOKENS}
    kernel = una_loss.segment_kernel
    found = [Variant("segment | fp32 | -", kernel, types, constants, pointers(types), options)]

    doubles = ("logps", "ref", "beta", "floats", "rewards", "losses", "loss", "coef")
    types = {f"{name}_ptr": "*fp64" for name in doubles}
    types |= {f"{name}_ptr": "*i64" for name in ("ints", "start", "entry")}
    types |= dict.fromkeys(("S", "U", "most_units"), "i32")
    most_forms = max(map(len, una_loss.FORMS.values()))
    for k in range(most_forms):
        forms = {kind: names[k % len(names)] for kind, names in una_loss.FORMS.items()}
        constants = {f"{kind.upper()}_FORM": form for kind, form in forms.items()}
        constants["BLOCK"] = una_loss.BLOCK
        # dtype of the denominator: of the table, or of num_units as a tensor
        for dtype in ("fp64", "i64", "fp32"):
            label = f"unit | {dtype} | {' '.join(forms.values())}"
            both = {**types, "denominator_ptr": f"*{dtype}"}
            found.append(Variant(label, una_loss.unit_kernel, both, constants, (), rowgrad.FUSED))
    return found


def scale_variants() -> list[Variant]:
    """Return the scaling of gradients in all dtypes, and with the other dtype of the factor."""
    block, options = split(scale.LAUNCH)
    strides = ("grad_stride", "out_stride")
    found = []
    for grad, out, factor in itertools.product(DTYPES, DTYPES, ("fp64", "fp32")):
        types = {"grad_ptr": f"*{grad}", "out_ptr": f"*{out}", "factor_ptr": f"*{factor}"}
        aligned = (*pointers(types), *strides)
        types |= dict.fromkeys((*strides, "factor_stride", "width", "blocks"), "i32")
        word = "-" if factor == "fp64" else f"{factor} factor"
        label = f"scale | {grad}->{out} | {word}"
        found.append(Variant(label, scale.scale_kernel, types, block, aligned, options))
    return found


def adamw_variants() -> list[Variant]:
    """Return AdamW of bf16 weights for gradients of both dtypes."""
    constants, options = split(adamw.LAUNCH)
    numbers = ("lr", "lr_decay", "log_beta1", "log_beta2", "rest1", "beta2", "rest2", "eps")
    found = []
    for grad in ("bf16", "fp32"):
        types = {"weight_ptr": "*bf16", "grad_ptr": f"*{grad}", "seed_ptr": "*i64"}
        types |= dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr", "step_ptr"), "*fp32")
        aligned = pointers(types)
        types |= dict.fromkeys(("number", "size"), "i32")
        types |= dict.fromkeys(numbers, "fp32")
        label = f"adamw | {grad} | -"
        found.append(Variant(label, adamw.adamw_kernel, types, constants, aligned, options))
    return found


def specialised(base: Variant, arch: str) -> list[Variant]:
    """Return the variant as other launches compile it (see above), where the program differs."""
    numbers = [
        p.name
        for p in base.kernel.params
        if base.types.get(p.name) == "i32" and not p.do_not_specialize
    ]
    constants, options = split(base.unaligned)
    unaligned = {"constants": base.constants | constants, "options": base.options | options}
    ones = {
        "types": {k: v for k, v in base.types.items() if k not in numbers},
        "constants": unaligned["constants"] | dict.fromkeys(numbers, 1),
        "aligned": pointers(base.types),
    }
    changes = {
        "aligned": {"aligned": (*pointers(base.types), *numbers)},
        "unaligned": {**unaligned, "aligned": ()},
        "one": {**unaligned, **ones} if numbers else {},
        "small": {"small": arch == "gfx942"},
    }
    found = []
    for word, change in changes.items():
        variant = replace(base, **change)
        if variant != base:
            name = f"{base.name} {word}".replace("| - ", "| ")
            found.append(replace(variant, name=name))
    return found


def variants() -> dict[str, tuple[Variant, str]]:
    """Return every row of the table: name -> (variant, target)."""
    shared = [
        *row_variants(),
        *stats_variants(),
        *gather_variants(),
        *scale_variants(),
        *adamw_variants(),
    ]
    found = {}
    for arch in TARGETS:
        for base in [*shared, *linear_variants(arch), *gemm_variants(), *loss_variants()]:
            found[f"{base.name} | {arch}"] = (base, arch)
            if not SPECIALISED.search(base.name):
                continue
            for variant in specialised(base, arch):
                found[f"{variant.name} | {arch}"] = (variant, arch)
    return found


def tool(name: str) -> str:
    """Return the path of a CUDA tool that Triton ships."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_listing(cubin: bytes) -> str:
    """Return the resources and the instructions of a cubin, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_usage(listing: str) -> dict[str, int]:
    """Return registers and spills."""
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return {"registers": int(used["REG"]), "spills": int(used["STACK"]) + int(used["LOCAL"])}


def body(listing: str, walks: bool) -> list[str]:
    """Return the instructions of the body (see above), without predicates.

    walks: whether to look for a loop over whole blocks
    """
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([^;]*?)\s*;", listing, re.M)
    places = {int(address, 16): i for i, (address, _) in enumerate(found)}
    program = [instruction for _, instruction in found]
    whole = [words for words in program if words != "NOP"]
    if not walks:
        return whole
    loops = []
    for end, words in enumerate(program):
        jump = re.match(r"BRA.*?(0x[0-9a-f]+)$", words)
        if jump and places[int(jump[1], 16)] < end:
            loops.append((places[int(jump[1], 16)], end))
    bodies = []
    for start, end in loops:
        # a loop inside another is no body
        if any(a <= start and end < b for a, b in loops):
            continue
        inner = [(a, b) for a, b in loops if start <= a and b < end]
        own = [i for i in range(start, end + 1) if not any(a <= i <= b for a, b in inner)]
        instructions = [program[i] for i in own]
        if any(words.startswith("LDG") for words in instructions):
            bodies.append(instructions)
    # The loop over the rest of a row has the instructions of its mask besides.
    return min(bodies, key=len, default=whole)


def accesses(instructions: list[str], operations: tuple[str, ...]) -> str:
    """Return the global accesses by their bits, as "2x128 1x32".

    operations: names of the instructions, up to the first point
    """
    widths = Counter()
    for words in instructions:
        name = words.split()[0]
        if name.split(".")[0] not in operations:
            continue
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
        if name.startswith("UTMA"):
            widths["tma"] += 1
        else:
            widths[bits[1] if bits else "32"] += 1
    return " ".join(f"{widths[width]}x{width}" for width in WIDTHS if width in widths)


def programs_at_once(registers: int, shared: int, warps: int, arch: str) -> int:
    """Return the number of programs that fit on a multiprocessor (a compute unit of AMD)."""
    if arch == "gfx942":
        # 4 SIMDs of 512 registers per lane, given out 8 at a time, and at most 8 waves each
        waves = 4 * min(8, 512 // (8 * triton.cdiv(registers, 8)))
        kept = 0
    else:
        # 4 partitions of 16384 registers, given out 256 to a warp at a time, at most 16 warps each
        waves = 4 * min(16, 16_384 // (256 * triton.cdiv(32 * registers, 256)))
        kept = 1024
    return min(32, waves // warps, SHARED[arch] // max(shared + kept, 1))


def amd_usage(assembly: str) -> dict[str, int]:
    """Return registers and spills, as the metadata of AMD assembly names them."""
    used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    spills = int(used["vgpr_spill_count"]) + int(used["sgpr_spill_count"])
    return {"registers": int(used["vgpr_count"]), "spills": spills}


def barrier_before_stores(assembly: str, nvidia: bool) -> bool:
    """Return whether every global store after a global load has a barrier in between.

    On AMD within straight runs of code, such as the loop over whole blocks: masked accesses are
    branches, laid out in any order.
    """
    if nvidia:
        runs = [assembly]
        load_word, store_word = r"ld\.global", r"st\.global"
    else:
        runs = re.split(r"^\.LBB|s_c?branch", assembly, flags=re.MULTILINE)
        load_word, store_word = "(?:global|buffer)_load", "(?:global|buffer)_store"
    pattern = re.compile(rf"({load_word})|(bar\.sync|s_barrier)|({store_word})")
    ordered = 0
    for run in runs:
        waiting = False
        loads = 0
        for load, barrier, store in pattern.findall(run):
            waiting = bool(load) or (waiting and not barrier)
            loads += bool(load)
            if store and waiting:
                return False
            ordered += bool(store) and loads > 0
    return ordered > 0


def measure(name: str) -> dict[str, int | float | bool | str]:
    """Compile a row of the table and return its figures."""
    variant, arch = variants()[name]
    arguments = variant.kernel.arg_names
    constants = {k: variant.constants.get(k) for k in arguments if k not in variant.types}
    signature = {k: variant.types.get(k, "constexpr") for k in arguments}
    attributes = {(arguments.index(k),): [["tt.divisibility", 16]] for k in variant.aligned}
    if variant.small:
        for pointer in pointers(variant.types):
            place = (arguments.index(pointer),)
            attributes.setdefault(place, []).append(["tt.pointer_range", 32])
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=variant.options)
    nvidia = TARGETS[arch].backend == "cuda"
    listing = nvidia_listing(compiled.asm["cubin"]) if nvidia else compiled.asm["amdgcn"]
    row = nvidia_usage(listing) if nvidia else amd_usage(listing)
    row["shared"] = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    row["programs"] = programs_at_once(row["registers"], row["shared"], warps, arch)
    if variant.overwrites:
        row["barrier"] = barrier_before_stores(compiled.asm["ptx" if nvidia else "amdgcn"], nvidia)
    if nvidia:
        instructions = body(listing, walks=variant.block is not None)
        row["instructions"] = len(instructions)
        if row["spills"]:
            row["spills_in_body"] = sum(words.startswith(("LDL", "STL")) for words in instructions)
        if variant.block:
            row["per_logit"] = round(len(instructions) * 32 * warps / variant.block, 1)
        row["loads"] = accesses(instructions, ("LDG", "LDGSTS", "UTMALDG"))
        row["stores"] = accesses(instructions, ("STG", "UTMASTG"))
    return row


def table_path(version: str) -> Path:
    """Return the file with the table of a Triton version (see above)."""
    pinned = f"triton=={version}" in CONSTRAINTS.read_text().split()
    short = ".".join(version.split(".")[:2])
    return RESULTS / ("kernels_compile.json" if pinned else f"kernels_compile_triton{short}.json")


def main() -> None:
    """Compile all rows, or the subset, and write or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--subset", action="store_true", help="a few rows, printed instead of written"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    names = list(variants())
    chosen = list(filter(SUBSET.search, names)) if args.subset else names
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = dict(zip(chosen, pool.map(measure, chosen), strict=True))
    table = {"triton": triton.__version__, "rows": rows}
    if args.subset:
        json.dump({**table, "names": names}, sys.stdout)
        return
    path = table_path(triton.__version__)
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
    path.write_text(f'{{\n "triton": "{triton.__version__}",\n "rows": {{\n{lines}\n }}\n}}\n')
    spilled = {k: v for k, v in rows.items() if v["spills"]}
    print(f"{len(rows)} rows in {path}; {len(spilled)} spill: {json.dumps(spilled, indent=1)}")


if __name__ == "__main__":
    main()
