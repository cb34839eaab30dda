"""The house: who may import whom, what an import needs, and the name `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "una_fast").rglob("*.py"))

# The core: what each file may import of ours.
CORE = {
    "feedback": set(),
    "losses": {"feedback"},
    "call_loss": {"feedback", "losses"},
    "engine": {"call_loss", "plan", "triton_engine"},
    "triton_engine": {"call_loss", "engine", "kernels", "losses", "plan"},
    "plan": {"feedback"},
    "passes": {"call_loss", "engine", "feedback", "losses", "plan"},
    "head": {"call_loss", "engine", "feedback", "losses", "passes", "plan"},
    "eager": {"feedback", "losses"},
    "offsets": set(),
    "optim": {"counters"},
    "counters": set(),
    "memory": {"counters"},
    "attention": set(),
    "records": set(),
    "probe": set(),
    "packing": {"attention"},
    "encode": {"records"},
    "data": {"attention", "encode", "feedback", "records"},
    "reward_settings": {"records"},
    "reward_sources": {"reward_settings"},
    "reward_http": {"reward_settings", "reward_sources"},
    "rewards": {"records", "reward_http", "reward_settings", "reward_sources"},
    "rollout": {"head", "policy", "scoring", "sharding", "vllm_sampler"},
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, as names below una_fast, type-checking imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "una_fast" and len(parts) > 1:
                found.add(parts[1])
            elif parts[0] in ("tests", "bench"):
                found.add(parts[0])
    modules = {p.stem for p in PACKAGE} | {"kernels", "tests", "bench"}
    return found & modules


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "una_fast").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT / "una_fast")))
def test_imports_follow_the_house(path):
    name, found = name_of(path), imports(path)
    if name in CORE:
        assert found <= CORE[name], f"{name} imports {sorted(found - CORE[name])}"
    assert not found & {"tests", "bench", "eager"}, "the library imports neither tests, benches nor the eager truth"
    assert "cli" not in found
    if name not in ("cli", "demo"):
        assert not found & {"train", "demo"}, "only the command line and the demo import the trainer"


def test_kernels_import_only_torch_and_triton():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton", *sys.stdlib_module_names} or name.startswith("una_fast.kernels")


def test_import_needs_torch_alone():
    others = [
        "transformers",
        "triton",
        "peft",
        "datasets",
        "safetensors",
        "jsonargparse",
        "yaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "trl",
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others!r}))  # importing any of them fails
import torch, una_fast
for name in una_fast.__all__:
    getattr(una_fast, name)
hidden = torch.randn(4, 8, requires_grad=True)
out = una_fast.linear_una_loss(hidden, torch.randn(11, 8), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4]),
                               una_fast.Feedback.pairs([0], [1]), ref_logps=torch.zeros(2))
out.loss.backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_kernels_folder_does_not_shadow_hugging_face_kernels():
    """transformers imports a package called `kernels` by its bare name; ours must only exist as una_fast.kernels."""
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""
    import kernels

    assert Path(kernels.__file__).parent != ROOT / "kernels" and hasattr(kernels, "get_kernel")
    spec = importlib.util.find_spec("una_fast.kernels")
    assert spec is not None and Path(spec.origin).resolve() == ROOT / "kernels" / "__init__.py"
    script = Path(sys.executable).with_name("una-fast")
    run = subprocess.run([script, "check"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "transformers" in run.stdout


def test_wheel_holds_the_kernels(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "una_fast/kernels/__init__.py" in names and "una_fast/head.py" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)


def test_constraints_pin_what_setup_asks_for():
    """Every direct dependency is pinned, so that an unpinned torch never pulls in another build."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            wanted = {ast.literal_eval(e) for e in node.value.elts}
    names = {"".join(c for c in w.split(";")[0].split("[")[0] if c not in "<>=!. 0123456789").lower() for w in wanted}
    assert names and names <= pinned, names - pinned


def test_readme_tables_are_those_of_the_stored_results():
    subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], check=True)
