"""Compile every kernel for GPUs that need not be there; write registers, spills and shared memory as a table.

    python bench/kernels_compile.py            rewrites bench/results/kernels_compile.json (minutes)
    python bench/kernels_compile.py --subset   prints the rows that the tests compare with it, as JSON

A row is "kernel | dtypes | flags | target". `spills`: bytes of stack on NVIDIA (no stack, no spill), spilled registers
on AMD. `barrier`: for kernels that may write over what they read, whether every store of the gradient has a barrier
between it and the load before it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
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
SUBSET = re.compile(
    r"row_grad \| fp32->bf16 \| bias softcap |row_logps_grad \| fp32->bf16 \| \d+warps |row_logps \| fp32 \| softcap "
    r"|gather_backward \| bf16|linear_logps \| bf16 \| bias softcap \| (?!sm_9)|linear_logps \| bf16 \| tma \| sm_90"
    r"|linear_logps \| fp32 \| - |mm \| bf16 \| col x row \+= |merge|segment|unit \| fp64 \| squared"
)


@dataclass(frozen=True)
class Variant:
    """types: of the arguments that are neither constexpr nor None. aligned: arguments that are multiples of 16."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    overwrites: bool = False


def pointers(types: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in types.items() if kind.startswith("*"))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Launch arguments into (constexprs, compiler options)."""
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    return ({k: v for k, v in options.items() if k not in names}, {k: v for k, v in options.items() if k in names})


def row_variants() -> list[Variant]:
    found = []
    same = [(x, x) for x in DTYPES]
    for name, logps, grad in (("row_logps", True, False), ("row_grad", False, True), ("row_logps_grad", True, True)):
        for u, du in [*same, ("fp32", "bf16"), ("fp32", "fp16")] if grad else same:
            for flags in FLAGS:
                types = {"u_ptr": f"*{u}", "targets_ptr": "*i64", "lse_ptr": "*fp32"}
                types |= {"du_ptr": f"*{du}", "coef_ptr": "*fp32"} if grad else {}
                types |= {"target_logit_ptr": "*fp32"} if logps else {}
                types |= {"bias_ptr": "*bf16"} if "bias" in flags else {}
                aligned = (*pointers(types), "u_stride", "du_stride")
                types |= dict.fromkeys(("u_stride", "du_stride", "start", "width"), "i32")
                types |= dict.fromkeys(("inner", "outer"), "fp32")
                block, options = split(rowgrad.LAUNCH)
                constants = {
                    "HAS_BIAS": "bias" in flags,
                    "HAS_SOFTCAP": "softcap" in flags,
                    "LOGPS": logps,
                    "GRAD": grad,
                    **block,
                }
                words = " ".join(flags) or "-"
                dtypes = f"{u}->{du}" if grad else u
                label = f"{name} | {dtypes} | {words}"
                kernel = rowgrad.rows_kernel
                found.append(Variant(label, kernel, types, constants, aligned, options, overwrites=grad))
    return found


def gather_variants() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        block, options = split(rowgrad.LAUNCH)
        types = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "logps_ptr": "*fp32", "lse_ptr": "*fp32"}
        aligned = (*pointers(types), "logits_stride")
        types |= {"logits_stride": "i32", "width": "i32", "inverse_temperature": "fp32"}
        found.append(Variant(f"gather | {dtype} | -", gather.gather_kernel, dict(types), block, aligned, options))
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
        tiling = logp_partials.tiling(arch, {"fp32": torch.float32}.get(dtype, torch.bfloat16))
        tma = [False, True] if dtype != "fp32" and arch in ("sm_90", "sm_100") else [False]
        for flags in FLAGS if dtype == "bf16" else (FLAGS[0], FLAGS[-1]):
            for descriptors in tma:
                kinds = (f"tensordesc<{dtype}[{rows},{tiling.BK}]>" for rows in (tiling.BM, tiling.BV))
                types = dict(zip(("hidden", "weight"), kinds if descriptors else [f"*{dtype}"] * 2, strict=True))
                types |= {"targets_ptr": "*i64", "part_ptr": "*fp32", "target_logit_ptr": "*fp32"}
                types |= {"bias_ptr": f"*{dtype}"} if "bias" in flags else {}
                aligned = (*pointers(types), "hidden_stride", "weight_stride", "D")
                types |= dict.fromkeys(("hidden_stride", "weight_stride", "N", "V", "D", "start"), "i32")
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
                found.append(Variant(label, logp_partials.partials_kernel, types, constants, aligned, options))
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "N": "i32", "vocab_tiles": "i32"}
    tiles = {"ROWS": logp_partials.MERGE_ROWS, "TILES": logp_partials.MERGE_TILES}
    found.append(Variant("merge | fp32 | -", logp_partials.merge_kernel, types, tiles, pointers(types), rowgrad.FUSED))
    return found


def gemm_variants() -> list[Variant]:
    found = []
    layouts = {"row x col": ("a_col", "b_row"), "row x row": ("a_col", "b_col"), "col x row": ("a_row", "b_col")}
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
                found.append(Variant(label, gemm.mm_kernel, types, constants, aligned, options))
    return found


def loss_variants() -> list[Variant]:
    found = []
    for ref in (False, True):
        types = {"tokens_ptr": "*fp32", "cu_ptr": "*i64", "logps_ptr": "*fp64", "ref_ptr": "*fp64"}
        types |= {"ref_tokens_ptr": "*fp32"} if ref else {}
        constants = {"HAS_REF": ref, "BLOCK": una_loss.TOKENS}
        options = {"num_warps": una_loss.TOKEN_WARPS, **rowgrad.FUSED}
        label = f"segment | fp32 | {'ref' if ref else '-'}"
        found.append(Variant(label, una_loss.segment_kernel, types, constants, pointers(types), options))
    doubles = ("logps", "ref", "scale", "floats", "denominator", "rewards", "losses", "loss", "coef")
    types = {f"{name}_ptr": "*fp64" for name in doubles} | {f"{n}_ptr": "*i64" for n in ("ints", "start", "entry")}
    types |= dict.fromkeys(("S", "U", "most_units"), "i32")
    names = {"pair": "PAIR_FORM", "binary": "BINARY_FORM", "score": "SCORE_FORM"}
    for k in range(max(map(len, una_loss.FORMS.values()))):  # every form in some variant
        forms = {names[kind]: all_forms[k % len(all_forms)] for kind, all_forms in una_loss.FORMS.items()}
        label = f"unit | fp64 | {' '.join(forms.values())}"
        constants = {**forms, "BLOCK": una_loss.BLOCK}
        found.append(Variant(label, una_loss.unit_kernel, types, constants, (), rowgrad.FUSED))
    return found


def variants() -> dict[str, tuple[Variant, str]]:
    """Every row of the table: name -> (variant, target)."""
    found = {}
    for arch in TARGETS:
        for variant in [
            *row_variants(),
            *gather_variants(),
            *linear_variants(arch),
            *gemm_variants(),
            *loss_variants(),
        ]:
            found[f"{variant.name} | {arch}"] = (variant, arch)
    return found


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
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

    On AMD in the loop over whole blocks alone (the wide accesses): masked ones are branches, laid out in any order."""
    names = ("ld\\.global", "st\\.global") if nvidia else ("load_dwordx", "store_dwordx")
    events = re.findall(rf"({names[0]})|(bar\.sync|s_barrier)|({names[1]})", assembly)
    waiting, stores = False, 0
    for load, barrier, store in events:
        waiting = bool(load) or (waiting and not barrier)
        stores += bool(store)
        if store and waiting:
            return False
    return stores > 0


def measure(name: str) -> dict[str, int | bool]:
    """One row of the table."""
    variant, arch = variants()[name]
    arguments = variant.kernel.arg_names
    constants = {k: variant.constants.get(k) for k in arguments if k not in variant.types}
    signature = {k: variant.types.get(k, "constexpr") for k in arguments}
    attributes = {(arguments.index(k),): [["tt.divisibility", 16]] for k in variant.aligned}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=variant.options)
    nvidia = TARGETS[arch].backend == "cuda"
    row = nvidia_usage(compiled.asm["cubin"]) if nvidia else amd_usage(compiled.asm["amdgcn"])
    row["shared"] = compiled.metadata.shared
    if variant.overwrites:
        row["barrier"] = barrier_before_stores(compiled.asm["ptx" if nvidia else "amdgcn"], nvidia)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", action="store_true", help="a few rows, printed instead of written")
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
