"""Compile every kernel for GPUs that need not be there; write registers, spills and shared memory as a table.

    python bench/kernels_compile.py            rewrites bench/results/kernels_compile.json (minutes)
    python bench/kernels_compile.py --subset   prints the rows that the tests compare with it, as JSON

A row is "kernel | dtypes | flags | target". `spills`: bytes of stack on NVIDIA (no stack, no spill), spilled registers
on AMD. `barrier`: for kernels that may write over what they read, whether every store of the gradient has a barrier
between it and the load before it.

A launch compiles anew for what it sees of its arguments. A row without such a flag is the launch of an odd vocabulary;
"aligned" is one whose pointers and numbers are all multiples of 16, "unaligned" one where none is, "one" one whose
numbers are all 1, which makes constants of them, and "small" (AMD) one whose tensors lie within 2 GiB.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the compiler, not the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from una_fast.kernels import gather, gemm, logp_partials, rowgrad, una_loss

RESULTS = Path(__file__).parent / "results" / "kernels_compile.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
FLAGS = [(), ("bias",), ("softcap",), ("bias", "softcap")]
SPECIALISED = re.compile(
    r"(row_logps \| fp32|row_\w*grad \| fp32->bf16) \| (bf16 bias softcap|-)$|gather.* \| -$"
    r"|(linear_logps|mm) \| (bf16|fp32) \| (-|tma|bias softcap|\w+ x \w+ \+=)$|merge|segment|unit \| \w+ \| linear"
)
SUBSET = re.compile(
    r"row_grad \| fp32->bf16 \| fp16 bias softcap \||row_logps_grad \| fp32->bf16 \| (4096x8|one|small) "
    r"|row_logps \| fp32 \| softcap |gather_backward \| bf16 \| unaligned |linear_logps \| fp16 \| bias \| (?!sm_9)"
    r"|linear_logps \| bf16 \| tma \| sm_90|linear_logps \| fp32 \| - |mm \| bf16 \| col x row \+= \|"
    r"|merge \| fp32 \| (-|one) |segment \| fp32 \| - |unit \| \w+ \| squared"
)


@dataclass(frozen=True)
class Variant:
    """types: of the arguments that are neither constexpr nor None. aligned: arguments that are multiples of 16.
    unaligned: other launch arguments where the numbers are no multiples of 16. small: whether the tensors are known to
    lie within 2 GiB."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: dict[str, Any] = field(default_factory=dict)
    overwrites: bool = False
    small: bool = False


def pointers(types: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in types.items() if kind.startswith("*"))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Launch arguments into (constexprs, compiler options)."""
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    return (
        {k: v for k, v in options.items() if k not in names},
        {k: v for k, v in options.items() if k in names},
    )


def row_variants() -> list[Variant]:
    found = []
    same = [(x, x) for x in DTYPES]
    usual, wider = rowgrad.BLOCKS[0], rowgrad.BLOCKS[1:]
    for name, logps, grad in (
        ("row_logps", True, False),
        ("row_grad", False, True),
        ("row_logps_grad", True, True),
    ):
        pairs = [*same, ("fp32", "bf16"), ("fp32", "fp16")] if grad else same
        flags = [(bias, softcap, usual) for bias in (None, *DTYPES) for softcap in (False, True)]
        for (u, du), (bias, softcap, blocks) in [
            *itertools.product(pairs, flags),
            *itertools.product([("fp32", "bf16")], [(None, False, blocks) for blocks in wider]),
        ]:
            types = {"u_ptr": f"*{u}", "targets_ptr": "*i64", "lse_ptr": "*fp32"}
            types |= {"du_ptr": f"*{du}", "coef_ptr": "*fp32"} if grad else {}
            types |= {"target_logit_ptr": "*fp32"} if logps else {}
            types |= {"bias_ptr": f"*{bias}"} if bias else {}
            aligned = (*pointers(types), "u_stride", "du_stride")
            types |= dict.fromkeys(("u_stride", "du_stride", "start", "width"), "i32")
            types |= dict.fromkeys(("inner", "outer"), "fp32")
            block, options = split({**rowgrad.LAUNCH, "BLOCK": blocks[0], "num_warps": blocks[1]})
            constants = {
                "HAS_BIAS": bool(bias),
                "HAS_SOFTCAP": softcap,
                "LOGPS": logps,
                "GRAD": grad,
                **block,
            }
            words = [f"{bias} bias"] * bool(bias) + ["softcap"] * softcap
            words += ["{}x{}".format(*blocks)] * (blocks != usual)
            label = f"{name} | {f'{u}->{du}' if grad else u} | {' '.join(words) or '-'}"
            found.append(
                Variant(
                    label, rowgrad.rows_kernel, types, constants, aligned, options, overwrites=grad
                )
            )
    return found


def gather_variants() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        block, options = split(rowgrad.LAUNCH)
        types = {
            "logits_ptr": f"*{dtype}",
            "targets_ptr": "*i64",
            "logps_ptr": "*fp32",
            "lse_ptr": "*fp32",
        }
        aligned = (*pointers(types), "logits_stride")
        types |= {"logits_stride": "i32", "width": "i32", "inverse_temperature": "fp32"}
        found.append(
            Variant(
                f"gather | {dtype} | -", gather.gather_kernel, dict(types), block, aligned, options
            )
        )
        del types["logps_ptr"]
        types |= {"grad_ptr": f"*{dtype}", "upstream_ptr": "*fp32", "grad_stride": "i32"}
        aligned = (*pointers(types), "logits_stride", "grad_stride")
        kernel = gather.gather_backward_kernel
        label = f"gather_backward | {dtype} | -"
        found.append(Variant(label, kernel, types, block, aligned, options, overwrites=True))
    return found


def linear_variants(arch: str) -> list[Variant]:
    found = []
    for dtype in DTYPES:
        tiling, by_number = (
            logp_partials.tiling(
                arch, {"fp32": torch.float32}.get(dtype, torch.bfloat16), by_vectors=by_vectors
            )
            for by_vectors in (True, False)
        )
        tma = [False, True] if dtype != "fp32" and arch in ("sm_90", "sm_100") else [False]
        for flags in FLAGS:
            for descriptors in tma:
                kinds = (
                    f"tensordesc<{dtype}[{rows},{tiling.BK}]>" for rows in (tiling.BM, tiling.BV)
                )
                types = dict(
                    zip(
                        ("hidden", "weight"),
                        kinds if descriptors else [f"*{dtype}"] * 2,
                        strict=True,
                    )
                )
                types |= {"targets_ptr": "*i64", "part_ptr": "*fp32", "target_logit_ptr": "*fp32"}
                types |= {"bias_ptr": f"*{dtype}"} if "bias" in flags else {}
                aligned = (*pointers(types), "hidden_stride", "weight_stride", "D")
                types |= dict.fromkeys(
                    ("hidden_stride", "weight_stride", "N", "V", "D", "start"), "i32"
                )
                types |= dict.fromkeys(("inner", "outer"), "fp32")
                tiles, options = split({**tiling._asdict(), **rowgrad.FUSED})
                constants = {
                    "HAS_BIAS": "bias" in flags,
                    "HAS_SOFTCAP": "softcap" in flags,
                    "TMA": descriptors,
                    **tiles,
                }
                words = " ".join([*flags, "tma"] if descriptors else flags) or "-"
                label = f"linear_logps | {dtype} | {words}"
                other = {} if descriptors else by_number._asdict()
                found.append(
                    Variant(
                        label,
                        logp_partials.partials_kernel,
                        types,
                        constants,
                        aligned,
                        options,
                        other,
                    )
                )
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "N": "i32", "vocab_tiles": "i32"}
    tiles = {"ROWS": logp_partials.MERGE_ROWS, "TILES": logp_partials.MERGE_TILES}
    found.append(
        Variant(
            "merge | fp32 | -",
            logp_partials.merge_kernel,
            types,
            tiles,
            pointers(types),
            rowgrad.FUSED,
        )
    )
    return found


def gemm_variants() -> list[Variant]:
    found = []
    layouts = {
        "row x col": ("a_col", "b_row"),
        "row x row": ("a_col", "b_col"),
        "col x row": ("a_row", "b_col"),
    }
    tiles, options = split({**gemm.TILES, **rowgrad.FUSED})
    for dtype in ("bf16", "fp16"):
        for layout, ones in layouts.items():  # of the logits, of dH, of dW: the strides that are 1
            for accumulate in (False, True):
                types = {
                    "a_ptr": f"*{dtype}",
                    "b_ptr": f"*{dtype}",
                    "out_ptr": "*fp32",
                    "M": "i32",
                    "N": "i32",
                    "K": "i32",
                }
                strides = ["a_row", "a_col", "b_row", "b_col", "out_row"]
                types |= {name: "i32" for name in strides if name not in ones}
                aligned = (*pointers(types), *(name for name in strides if name not in ones))
                constants = {**dict.fromkeys(ones, 1), "ACCUMULATE": accumulate, **tiles}
                label = f"mm | {dtype} | {layout}{' +=' if accumulate else ''}"
                found.append(
                    Variant(label, gemm.mm_kernel, types, constants, aligned, options, gemm.SINGLES)
                )
    return found


def loss_variants() -> list[Variant]:
    found = []
    for ref in (False, True):
        types = {"tokens_ptr": "*fp32", "cu_ptr": "*i64", "logps_ptr": "*fp64", "ref_ptr": "*fp64"}
        types |= {"ref_tokens_ptr": "*fp32"} if ref else {}
        constants = {"HAS_REF": ref, "BLOCK": una_loss.TOKENS}
        options = {"num_warps": una_loss.TOKEN_WARPS, **rowgrad.FUSED}
        label = f"segment | fp32 | {'ref' if ref else '-'}"
        found.append(
            Variant(label, una_loss.segment_kernel, types, constants, pointers(types), options)
        )
    doubles = ("logps", "ref", "scale", "floats", "rewards", "losses", "loss", "coef")
    types = {f"{name}_ptr": "*fp64" for name in doubles} | {
        f"{n}_ptr": "*i64" for n in ("ints", "start", "entry")
    }
    types |= dict.fromkeys(("S", "U", "most_units"), "i32")
    names = {"pair": "PAIR_FORM", "binary": "BINARY_FORM", "score": "SCORE_FORM"}
    for k in range(max(map(len, una_loss.FORMS.values()))):  # every form in some variant
        forms = {
            names[kind]: all_forms[k % len(all_forms)] for kind, all_forms in una_loss.FORMS.items()
        }
        constants = {**forms, "BLOCK": una_loss.BLOCK}
        for dtype in (
            "fp64",
            "i64",
            "fp32",
        ):  # of the denominator: the table's, or num_units as a tensor
            label = f"unit | {dtype} | {' '.join(forms.values())}"
            both = {**types, "denominator_ptr": f"*{dtype}"}
            found.append(Variant(label, una_loss.unit_kernel, both, constants, (), rowgrad.FUSED))
    return found


def specialised(base: Variant, arch: str) -> list[Variant]:
    """The variant as other launches compile it (see above), where that is another program."""
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
    found = (
        replace(base, name=f"{base.name} {word}".replace("| - ", "| "), **c)
        for word, c in changes.items()
    )
    return [v for v in found if replace(v, name=base.name) != base]


def variants() -> dict[str, tuple[Variant, str]]:
    """Every row of the table: name -> (variant, target)."""
    found = {}
    for arch in TARGETS:
        for base in [
            *row_variants(),
            *gather_variants(),
            *linear_variants(arch),
            *gemm_variants(),
            *loss_variants(),
        ]:
            for variant in [
                base,
                *(specialised(base, arch) if SPECIALISED.search(base.name) else []),
            ]:
                found[f"{variant.name} | {arch}"] = (variant, arch)
    return found


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout.split(" Function ")[-1]))
    return {"registers": int(used["REG"]), "spills": int(used["STACK"]) + int(used["LOCAL"])}


def amd_usage(assembly: str) -> dict[str, int]:
    used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    return {
        "registers": int(used["vgpr_count"]),
        "spills": int(used["vgpr_spill_count"]) + int(used["sgpr_spill_count"]),
    }


def barrier_before_stores(assembly: str, nvidia: bool) -> bool:
    """Whether every global store after a global load has a barrier between them.

    On AMD within straight runs of code, of which the loop over whole blocks is one: masked accesses are branches, laid
    out in any order."""
    runs = [assembly] if nvidia else re.split(r"^\.LBB|s_c?branch", assembly, flags=re.MULTILINE)
    names = (
        ("ld\\.global", "st\\.global")
        if nvidia
        else ("(?:global|buffer)_load", "(?:global|buffer)_store")
    )
    ordered = 0
    for run in runs:
        waiting, loads = False, 0
        for load, barrier, store in re.findall(
            rf"({names[0]})|(bar\.sync|s_barrier)|({names[1]})", run
        ):
            waiting = bool(load) or (waiting and not barrier)
            loads += bool(load)
            if store and waiting:
                return False
            ordered += bool(store) and loads > 0
    return ordered > 0


def measure(name: str) -> dict[str, int | bool]:
    """One row of the table."""
    variant, arch = variants()[name]
    arguments = variant.kernel.arg_names
    constants = {k: variant.constants.get(k) for k in arguments if k not in variant.types}
    signature = {k: variant.types.get(k, "constexpr") for k in arguments}
    attributes = {(arguments.index(k),): [["tt.divisibility", 16]] for k in variant.aligned}
    for name in pointers(variant.types) if variant.small else ():
        attributes.setdefault((arguments.index(name),), []).append(["tt.pointer_range", 32])
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=variant.options)
    nvidia = TARGETS[arch].backend == "cuda"
    row = nvidia_usage(compiled.asm["cubin"]) if nvidia else amd_usage(compiled.asm["amdgcn"])
    row["shared"] = compiled.metadata.shared
    if variant.overwrites:
        row["barrier"] = barrier_before_stores(compiled.asm["ptx" if nvidia else "amdgcn"], nvidia)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--subset", action="store_true", help="a few rows, printed instead of written"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    names = list(variants())
    chosen = [n for n in names if SUBSET.search(n)] if args.subset else names
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = dict(zip(chosen, pool.map(measure, chosen), strict=True))
    table = {"triton": triton.__version__, "rows": rows}
    if args.subset:
        json.dump({**table, "names": names}, sys.stdout)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
    RESULTS.write_text(f'{{\n "triton": "{triton.__version__}",\n "rows": {{\n{lines}\n }}\n}}\n')
    spilled = {k: v for k, v in rows.items() if v["spills"]}
    print(f"{len(rows)} rows in {RESULTS}; {len(spilled)} spill: {json.dumps(spilled, indent=1)}")


if __name__ == "__main__":
    main()
