"""The house: who may import whom, what an import needs, and the name `kernels`."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from una_fast.commands import COMMANDS
from una_fast.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "una_fast").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "kernels").glob("*.py"))]

# Who may import whom: a room imports from the lines below its own, and from itself where it is a
# folder. Rooms of one line do not know each other.
LAYERS = """
feedback offsets counters printable files lazy signals score_maps extras
checks logs settings_file turns
parallel group
distributed
attention losses kernels flags
data head layout presets
model
rewards
generation_server
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


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return the syntax nodes of a file, parsed once for all rules."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Return every name that a file imports, with its module: lazy and type-only imports too."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


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
    for node in nodes_of(path):
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
        for node in nodes_of(path):
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


# Hides the modules of the extras from a new process, as if they had never been installed.
WITHOUT_EXTRAS = """
import sys
from una_fast.extras import EXTRA_OF

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {*EXTRA_OF, *sys.argv[1].split(",")}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""

OP = """
import torch, una_fast
for name in una_fast.__all__:
    getattr(una_fast, name)
hidden = torch.randn(4, 8, requires_grad=True)
targets, cu_seqlens = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4])
weight = torch.randn(11, 8)
out = una_fast.linear_una_loss(hidden, weight, targets, cu_seqlens,
                               una_fast.Feedback.pairs([0], [1]), ref_logps=torch.zeros(2))
out.loss.backward()
logps = torch.log_softmax(hidden.detach() @ weight.T, dim=-1)[:, 0].view(2, 2).sum(1)
assert torch.allclose(out.logps, logps.double(), atol=1e-5), (out.logps, logps)
assert hidden.grad.abs().sum() > 0
"""


# The words of each command: what it does without the extra is to name the extra.
BARE_COMMANDS = {
    "init": ["--model", "x", "--data", "x.jsonl"],
    "train": ["--model", "x", "--data", "x.jsonl", "--output_dir", "x"],
    "precompute-ref": ["--model", "x", "--data", "x.jsonl", "--output_dir", "x"],
    "plan": ["--model", "x"],
    "report": ["x"],
    "merge": ["x", "--output_dir", "y"],
    "chat": ["x"],
    "data": ["x.jsonl", "--model", "x"],
    "check": ["--model", "x"],
    "bench": ["--hidden", "64", "--vocab", "500", "--tokens", "64"],
    "demo": [],
}


# Say whether the op ran, what every command answered, and how the plan of one call ended.
BARE_RUN = """
import contextlib, io, json, traceback
try:
    exec(sys.argv[2])
    print(json.dumps(["op", ""]))
except BaseException:
    print(json.dumps(["op", traceback.format_exc()]))
sys.argv[1] = ""  # for the commands, Triton is no extra
from una_fast.cli import main
for name, words in json.loads(sys.argv[3]).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([name, *words])
    print(json.dumps(["command", name, status, said.getvalue()]))
print(json.dumps(["plan", main(["plan", "--op", "10", "64", "100"])]))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[dict[str, list[Any]], Path]:
    """Return what a process without the extras says, by subject, and its working directory.

    One process serves every test of such an installation: most of its time, torch is imported.
    """
    folder = tmp_path_factory.mktemp("bare")
    given = ["triton", OP, json.dumps(BARE_COMMANDS)]
    words = [sys.executable, "-c", WITHOUT_EXTRAS + BARE_RUN, *given]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, list[Any]] = {"op": [], "command": [], "plan": []}
    for line in ran.stdout.splitlines():
        if line.startswith('["'):
            subject, *answer = json.loads(line)
            said[subject].append(answer)
    return said, folder


def test_import_needs_torch_alone(bare):
    said, _ = bare
    assert said["op"] == [[""]], said["op"][0][0]


def test_every_command_names_the_extra_that_is_missing(bare):
    assert set(BARE_COMMANDS) == set(COMMANDS)
    said, folder = bare
    assert [name for name, _, _ in said["command"]] == list(BARE_COMMANDS)
    for name, status, error in said["command"]:
        assert status == 1 and error.count("\n") == 1, (name, error)
        assert re.search(r'needs \w+, which is not installed: pip install "una-fast', error), error
    assert not any(folder.iterdir())


def test_the_op_is_planned_without_the_extra(bare):
    said, _ = bare
    assert said["plan"] == [[0]]


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", folder]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, ROOT], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "una_fast/kernels/__init__.py" in names and "una_fast/head/ops.py" in names
    assert "una_fast/report/templates/page.css" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)


def test_wheel_runs_the_op_where_nothing_but_torch_is_installed(wheel, tmp_path):
    """A host has its own transformers, or none: the wheel asks for torch and triton alone."""
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    needed = ["torch", "torchgen", "functorch", *TORCH_NEEDS]
    for name in needed:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin)
        found = found.parent if spec.submodule_search_locations else found
        (packages / found.name).symlink_to(found)
    python = tmp_path / "venv" / "bin" / "python"
    env = {"PATH": os.environ["PATH"], "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
    code = f"{OP}\nassert una_fast.__file__.startswith({str(packages)!r}), una_fast.__file__"
    run = subprocess.run([python, "-c", code], cwd="/", env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in ("transformers", "numpy", "peft"):
        found = subprocess.run([python, "-c", f"import {name}"], env=env, capture_output=True)
        assert found.returncode != 0, f"{name} can be imported, and the test shows nothing"
    (metadata,) = packages.glob("una_fast-*.dist-info/METADATA")
    asked = re.findall(r"(?m)^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata.read_text())
    assert sorted(asked) == ["torch", "triton"]


# What torch itself imports, by the names of the modules.
TORCH_NEEDS = ("typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "filelock")


def setup_arguments() -> dict[str, Any]:
    """Return the requirements that setup.py gives: of the core, and of each extra."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            found["core"] = ast.literal_eval(node.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            found |= ast.literal_eval(node.value)
    return found


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def installed_extras() -> set[str]:
    """Return the extras that README, CONTRIBUTING and the scripts install."""
    files = ["README.md", "CONTRIBUTING.md", "docs/index.md", "tests/versions.sh"]
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in files]
    found = re.findall(r'-e "\.\[([\w,]+)\]"', "\n".join(texts))
    return set(",".join(found).split(","))


def test_constraints_pin_what_setup_asks_for():
    """Every direct dependency is pinned, so that an unpinned torch never pulls in another build."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    asked = setup_arguments()
    extras = installed_extras()
    assert {"train", "test", "docs", "trl", "optim", "liger", "gguf", "bench"} <= extras
    for name in ("core", *sorted(extras)):
        names = names_of(asked[name])
        assert names and names <= pinned, (name, names - pinned)


def test_the_extra_of_a_missing_module_installs_it():
    """Messages name an extra by the module: setup.py must agree."""
    packages = {"yaml": "pyyaml", "liger_kernel": "liger-kernel"}
    asked = setup_arguments()
    for extra in set(EXTRA_OF.values()):
        assert extra in asked
    brought_along = {"accelerate", "huggingface_hub", "tokenizers"}
    for module in set(EXTRA_OF) - brought_along:
        assert packages.get(module, module) in names_of(asked[EXTRA_OF[module]]), module
    modules = {packages.get(module, module) for module in EXTRA_OF}
    assert names_of(asked["train"]) <= modules


def test_the_core_imports_nothing_of_the_extras_at_its_head():
    """The op, the feedback and the loss: no import statement of theirs names another package."""
    core = ["head", "losses", "feedback", "offsets", "lazy", "logs", "printable", "extras"]
    for path in FILES:
        if room_of(path) in core:
            assert not {name.split(".")[0] for name in imports(path)} & set(EXTRA_OF), path


def test_readme_tables_are_those_of_the_stored_results():
    subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], check=True)
