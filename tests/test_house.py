"""The house: who may import whom, what an import needs, and the name `kernels`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "una_fast").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "kernels").glob("*.py"))]

# Who may import whom: a room imports from the lines below its own, and from itself where it is a
# folder. Rooms of one line do not know each other.
LAYERS = """
feedback offsets counters distributed printable files lazy signals score_maps
checks logs settings_file
attention losses kernels flags
data head layout presets
model
rewards
config
optim resolved report
online capacity
train
guide bench
demo integrations
commands
cli
command
__init__
"""
LAYER = {room: number for number, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def imports(path: Path) -> set[str]:
    """Return every name that a file imports, with its module: lazy and type-only imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(path: Path) -> str:
    """Return the room of a file: its folder in una_fast, or the file itself where it has none."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(ROOT / "una_fast").parts[0].removesuffix(".py")


def arrows(path: Path) -> set[str]:
    """Return the rooms that a file imports from."""
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == "una_fast" and parts[1] in LAYER}


def test_every_room_has_a_layer():
    rooms = {room_of(path) for path in PACKAGE}
    assert rooms | {"kernels"} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    upward = {other for other in arrows(path) if other != room and LAYER[other] >= LAYER[room]}
    assert not upward, f"{room} is below {sorted(upward)}, or beside"
    outside = {name.split(".")[0] for name in imports(path)} & {"tests", "bench"}
    assert not outside, "the library imports neither tests nor benches"


def test_an_arrow_upwards_is_seen(tmp_path):
    """Lazy, type-only and whole-module imports are arrows too."""
    lines = [
        "def f():",
        "    from una_fast.train.loop import train",
        "if TYPE_CHECKING:",
        "    from una_fast.config import RunConfig",
        "import una_fast.online.steps as steps",
        "from una_fast import cli",
    ]
    path = tmp_path / "planted.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert arrows(path) == {"train", "config", "online", "cli"}


def test_no_circle_between_files():
    """Within a room, too: each file imports files that do not lead back to it."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PACKAGE}
    below = {}
    for module, path in modules.items():
        prefixes = {name.rpartition(".")[0] for name in imports(path)} | imports(path)
        below[module] = prefixes & set(modules) - {module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in done:
            for other in below[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_the_truth_stays_out_of_the_library():
    for path in PACKAGE:
        assert "una_fast.head.eager" not in {name.rpartition(".")[0] for name in imports(path)}


# Calls by which a file, a name or a text becomes code. `all_gather_object` of distributed.py
# pickles too, between the ranks of one run.
UNSAFE = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
UNSAFE |= {"yaml.full_load", "dcp.load", "numpy.load", "np.load", "tempfile.mktemp"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def unsafe(path: Path) -> list[str]:
    """Return the unsafe calls and imports of a file."""
    found = [name for name in imports(path) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in UNSAFE or called.startswith("torch.distributed.checkpoint.load"):
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        found += [
            f"{name}=True" for name in ("shell", "trust_remote_code") if given.get(name) == "True"
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_becomes_code(path):
    assert not unsafe(path)


def test_an_unsafe_call_is_seen(tmp_path):
    path = tmp_path / "planted.py"
    lines = [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "subprocess.run(words, shell=True)",
        "model.eval()",
        "re.compile(text)",
        "eval(text)",
        "dcp.load(state)",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(unsafe(path)) == 8


def test_kernels_import_only_torch_and_triton():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton", *sys.stdlib_module_names} or name.startswith(
                    "una_fast.kernels"
                )


@pytest.mark.parametrize(
    "name", ["una_fast", "una_fast.data", "una_fast.rewards", "una_fast.train"]
)
def test_a_face_shows_what_it_names(name):
    face = importlib.import_module(name)
    for public in face.__all__:
        assert getattr(face, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


def test_import_needs_torch_alone():
    others = [
        "transformers",
        "triton",
        "peft",
        "datasets",
        "safetensors",
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
targets, cu_seqlens = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4])
out = una_fast.linear_una_loss(hidden, torch.randn(11, 8), targets, cu_seqlens,
                               una_fast.Feedback.pairs([0], [1]), ref_logps=torch.zeros(2))
out.loss.backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_kernels_folder_does_not_shadow_hugging_face_kernels():
    """transformers imports a package `kernels` by its bare name; ours is una_fast.kernels alone."""
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""
    import kernels

    assert Path(kernels.__file__).parent != ROOT / "kernels" and hasattr(kernels, "get_kernel")
    spec = importlib.util.find_spec("una_fast.kernels")
    assert spec is not None and Path(spec.origin).resolve() == ROOT / "kernels" / "__init__.py"
    script = Path(sys.executable).with_name("una-fast")
    run = subprocess.run([script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "precompute-ref" in run.stdout


def test_wheel_holds_the_kernels(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ROOT,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "una_fast/kernels/__init__.py" in names and "una_fast/head/ops.py" in names
    assert "una_fast/report/templates/page.css" in names
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
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    assert names and names <= pinned, names - pinned


def test_readme_tables_are_those_of_the_stored_results():
    subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], check=True)
