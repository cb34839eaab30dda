#!/usr/bin/env python3
"""Mutate settings, as YAML files and as flags, for every command, and look at what happens.

    .venv/bin/python tests/trials/settings.py [--seed N] [--short]

Nothing is loaded: the functions behind the commands are replaced by one that keeps the settings it
was given. A mutation must end in accepted settings that an independent oracle finds sane, or in
exit status 1 or 2 and one printable line that names the setting or the file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from common import Trial, in_process, main

from una_fast import cli, commands

MUTATIONS = 3000
SHORT = 150
LIMIT = 20  # seconds
LONGEST = 1700  # characters of a message

OFFLINE = {"model": "some/model", "data": ["x.jsonl"], "output_dir": "out"}
ONLINE = OFFLINE | {"mode": "online", "rewards": ["pkg.module.function"], "batch_size": 4}
BASES: dict[str, list[dict[str, Any]]] = {
    "train": [
        OFFLINE,
        OFFLINE | {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}},
        OFFLINE
        | {"columns": {"prompt": "q"}, "score_columns": {"a": 1.0}, "divide": 2.0}
        | {"score_map": "range", "score_range": [0, 1], "eval_data": "y.jsonl", "eval_every": 5},
        OFFLINE | {"data": [{"path": "x.jsonl", "weight": 0.5, "max_tokens": 4096}, "y.jsonl"]},
        ONLINE,
        ONLINE | {"mode": "mixed", "rewards": [{"judge": "http://h:8000/v1", "judge_model": "j"}]},
    ],
    "precompute-ref": [OFFLINE],
    "plan": [
        {"model": "some/model"},
        {"model": "some/model", "prompt": 10, "responses": [4, 5], "gpu": "H100"},
    ],
    "check": [{}, {"model": "some/model"}],
    "demo": [{}, {"output_dir": "runs/x", "seed": 3, "quick": True}],
}
FIELDS = {name: [f.name for f in dataclasses.fields(commands.settings_of(name))] for name in BASES}

# YAML texts that stand in the place of a value.
VALUES = (
    """
null|~||''|' '|true|false|yes|no|on|0|1|-1|-0|-0.0|2|7|0.5|-0.5|1.5|1e-3|1e308|1e309|-1e309|1e-320
.inf|-.inf|.nan|.NaN|inf|nan|Infinity|NaN|"1e3"|"0.5"|'1'|"true"|"null"|1_000|1__|010|0x10|0o17
1:30|12:30:45|2024-01-01|2024-99-99|2001-12-14t21:59:43.10-05:00|99999999999999999999
[]|[null]|[1]|[0.9, 0.999]|[0.9, 1.0]|[-0.1, 0.5]|[.nan, 0.5]|[1, 2, 3]|["a", "b"]|[[1]]|[true, 1]
[{}]|[{path: 3}]|[{path: x, weight: .nan}]|[{path: x, columns: 3}]|[{path: x, 3: y}]|[{weight: 1}]
[{path: x, max_tokens: "5"}]|[{path: x, online: maybe}]|[{function: 3}]|[{judge: x}]|[{endpoint: 'ftp://x'}]
[{endpoint: 'http://h:99999/'}]|[{endpoint: 'http://h/', timeout: .inf}]|[{model: a, weight: 0}]
[{model: a, judge: b}]|[{endpoint: 'http://u:***@h/'}]|[{endpoint: 'http://***@h/?k=***'}]
{}|{a: 1}|{a: .nan}|{1: 2}|{null: 1}|{r: 0}|{r: 1000000000}|{r: 4, rank: 3}|{r: "4"}|{r: .inf}
{r: true}|{alpha: -3}|{target_modules: []}|{target_modules: [3]}|{r: null}|{prompt: 3}|{prompt: q}
{nonsense: q}|{class_path: os.system, init_args: {command: touch PWNED}}|{prompt: "a\\0b"}
a text|"\\e[2J\\a"|"\\u202e"|"a\\nb"|"a\\0b"|/|.|..|~/x|\u202eevil|\u200b|１２|٣|½|é
"\\U0001F600"|-x|--|!!python/object/apply:os.system [touch PWNED]|!!int foo|!!float x|!!bool x
!!timestamp x|!!binary x|!!set {a}|!!omap [a: 1]|!!null x|!x y|! 3|*unknown|&a [*a]|<<: 3|@x|%x|`x`
[1, 2|{a: b|"open|- - - -|sgd|adamw|mixed|online|offline|group|ema|cached|range|none
triton|cuda|H100|wandb|[wandb, wandb]|all-linear
""".strip("\n")
    .replace("\n", "|")
    .split("|")
)
VALUES += ["9" * 400, "9" * 5000, "-" + "9" * 30, "x" * 5000, "[" * 300 + "]" * 300, "[" * 5000]
VALUES += ["{a: " * 40 + "1" + "}" * 40, "[" + "1, " * 20000 + "1]", "[" + "a, " * 40000 + "a]"]

SECRETS = ("PASSW0RD", "QUERYKEY")
VALUES += [
    f"[{{endpoint: 'http://u:{SECRETS[0]}@h:99999/?key={SECRETS[1]}'}}]",
    f"'http://u:{SECRETS[0]}@h/?key={SECRETS[1]}'",
]

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n"
for before, after in zip("abcdefgh", "bcdefghi", strict=True):
    BOMB += f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"

# Whole files, as bytes; {} is a usable file.
FILES = {
    "empty": b"",
    "a comment": b"# nothing\n",
    "null": b"null\n",
    "a list": b"- a\n- b\n",
    "a text": b"model\n",
    "a number": b"3\n",
    "NUL": b"model: a\x00b\n",
    "not UTF-8": b"model: \xff\xfe\n",
    "UTF-16": "model: a\n".encode("utf-16"),
    "BOM": b"\xef\xbb\xbf{}",
    "equal keys": b"{}\nmodel: a\nmodel: b\n",
    "a tag": b"!!python/object/apply:os.system ['touch PWNED']\n",
    "python/name": b"model: !!python/name:os.system\n",
    "a bomb": BOMB.encode(),
    "a bomb in data": b"data: [{path: x, columns: {prompt: &p [a]}}]\n" + BOMB.encode(),
    "a circle": b"data: &d\n- *d\n",
    "an unknown key": b"{}\nlearning_rte: 1\n",
    "a key of escapes": b'{}\n"\\e[2J\\n": 1\n',
    "number key": b"{}\n3: 1\n",
    "list key": b"{}\n? [a]\n: 1\n",
    "two documents": b"{}\n---\nmodel: b\n",
    "deep": b"data: " + b"[" * 100_000 + b"\n",
    "deep blocks": "\n".join(" " * n + "a:" for n in range(1200)).encode(),
    "a million": b"data:\n" + b"- a\n" * 1_000_000,
    "many": b"data:\n" + b"- a\n" * 200_000,
    "merge": b"x: &x {model: a}\n<<: *x\n",
    "tabs": b"model:\ta\n\tdata: b\n",
    "binary": bytes(range(256)) * 8,
}
PLACES = (
    "missing",
    "directory",
    "fifo",
    "loop",
    "/dev/zero",
    "/dev/null",
    "unreadable",
    "a\nb",
    "",
)

ANY = [*FIELDS["plan"], "settings.yaml"]


def keep(settings: Any) -> Any:
    """Stand in for a command: keep its settings."""
    accepted.append(settings)
    return types.SimpleNamespace(output_dir=Path("out"), steps=0, metrics={})


accepted: list[Any] = []
"""The settings that the command was given."""


@contextlib.contextmanager
def replaced_commands() -> Iterator[None]:
    """Put `keep` in the place of everything that a command would load and do."""
    fakes = {}
    for module, name in (
        ("una_fast.train.loop", "train"),
        ("una_fast.train.precompute", "precompute_reference"),
        ("una_fast.train.memory_plan", "plan_run"),
        ("una_fast.demo.run", "run_demo"),
    ):
        fakes[module] = types.ModuleType(module)
        keeper = keep if name != "precompute_reference" else lambda settings: keep(settings) and {}
        setattr(fakes[module], name, keeper)
    check = cli.COMMANDS["check"]._replace(run=lambda parsed: keep(commands.settings_from(parsed)))
    with mock.patch.dict(sys.modules, fakes), mock.patch.dict(cli.COMMANDS, check=check):
        yield


def insane(settings: Any) -> str | None:
    """Return what is wrong with accepted settings, by rules of the oracle's own; None if sane."""
    values = dataclasses.asdict(settings)

    def walk(name: str, value: Any) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}"
        if isinstance(value, int) and abs(value) >= 2**63:
            return f"{name} is huge"
        if isinstance(value, str):
            return f"{name} holds NUL" if "\0" in value else None
        inner = []
        if isinstance(value, dict):
            inner = [(f"{name}.{key}", item) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            inner = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
        return next(filter(None, (walk(*pair) for pair in inner)), None)

    bounds = {
        "beta": (5e-324, 1e309), "learning_rate": (0, 1e309), "weight_decay": (0, 1e309),
        "warmup_ratio": (0, 1), "epochs": (5e-324, 1e9), "batch_size": (1, 2**63),
        "max_grad_norm": (5e-324, 1e309), "seed": (0, 2**63), "max_steps": (1, 2**63),
        "workspace_mb": (5e-324, 1e309), "memory_gib": (5e-324, 1e309),
        "temperature": (5e-324, 1e309),
        "top_p": (5e-324, 1), "keep_checkpoints": (1, 2**63), "log_every": (1, 2**63),
        "eval_fraction": (0, 0.999999), "max_new_tokens": (1, 2**63), "save_every": (1, 2**63),
        "max_skipped_steps": (0, 2**63), "prompt": (0, 2**63), "world_size": (1, 2**63),
        "samples_per_prompt": (1, 2**63), "micro_batch_size": (1, 2**63), "mlp_tile": (1, 2**63),
        "max_tokens": (1, 2**63), "max_kl": (5e-324, 1e309), "saved_completions": (0, 2**63),
    }  # fmt: skip
    for name, value in values.items():
        problem = walk(name, value)
        if problem:
            return problem
        default = next(f for f in dataclasses.fields(settings) if f.name == name).default
        if isinstance(default, bool) != isinstance(value, bool):
            return f"{name} is {value!r}"
        if name in bounds and value is not None:
            low, high = bounds[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return f"{name} is {value!r}"
            if not low <= value <= high:
                return f"{name} is {value}"
    betas = values.get("adam_betas", (0, 0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        return f"adam_betas are {betas}"
    lora = values.get("lora")
    if lora and not (1 <= lora["r"] <= 10**6 and lora["alpha"] > 0 and lora["target_modules"]):
        return f"lora is {lora}"
    return None


class Mutator:
    """Makes mutated command lines, from a seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.folder = folder

    def next(self) -> tuple[str, list[str], list[str]]:
        """Return (description, words, names of which the refusal must hold one)."""
        command = self.rng.choice([*BASES, "train", "train", "train"])
        base = copy.deepcopy(self.rng.choice(BASES[command]))
        how = self.rng.choice(["value"] * 6 + ["flag"] * 4 + ["inner", "file", "place", "word"])
        return getattr(self, f"_{how}")(command, base)

    def _text(self) -> str:
        if self.rng.random() < 0.1:
            return str(self.rng.choice([1, -1]) * 10 ** self.rng.randint(-400, 400))[:300]
        return self.rng.choice(VALUES)

    def _value(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Replace the values of one or two settings in the file by texts of YAML."""
        names = self.rng.sample(FIELDS[command], self.rng.choice([1, 1, 2]))
        lines = {name: json.dumps(value) for name, value in base.items()}
        lines |= {name: self._text() for name in names}
        text = "".join(f"{name}: {value}\n" for name, value in lines.items())
        return self._with_file(command, text.encode("utf-8", "surrogatepass"), names)

    def _inner(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Replace a value inside of a list or a mapping of the file."""
        places: list[tuple[Any, Any, str]] = []
        for name, value in base.items():
            places.append((base, name, name))
            for item in [value, *(value if isinstance(value, list) else [])]:
                if isinstance(item, (dict, list)):
                    keys = item if isinstance(item, dict) else range(len(item))
                    places += [(item, key, name) for key in keys]
        if not places:
            return self._value(command, base)
        holder, key, name = self.rng.choice(places)
        holder[key] = "HERE"
        text = json.dumps(base).replace('"HERE"', self._text().replace("\n", " "))
        return self._with_file(command, text.encode("utf-8", "surrogatepass"), [name])

    def _flag(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Give one or two settings as flags."""
        names = self.rng.sample(FIELDS[command], self.rng.choice([1, 1, 2]))
        words = [command]
        for name, value in base.items():
            words.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
        for name in names:
            text = self._text()
            if self.rng.random() < 0.1:
                text += self.rng.choice(["\ud800", "\udcff", "\x00", "\x1b[2J"])
            flag = f"--{name}.r" if name == "lora" and self.rng.random() < 0.5 else f"--{name}"
            words += [f"{flag}={text}"] if self.rng.random() < 0.7 else [flag, text]
        return f"{words[-3:]}"[:300], words, [*names, "unrecognized", "expected one argument"]

    def _word(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Put a stray or mistyped word among the flags."""
        word = self.rng.choice(
            [
                "--learning_rte=1",
                "--lr",
                "stray",
                "--",
                "-x",
                "--model",
                "--\x1b[2J",
                "--lora.rank=3",
            ]
            + ["--lora.r", "--config", "--op", "--op=3", "--help=3", "-v", "\udcff", "", "--=", "-"]
        )
        words = [command, *(f"--{n}={json.dumps(v)}" for n, v in base.items()), word]
        if self.rng.random() < 0.3:
            words = [word, *words[:-1]]
        return f"{words}"[:300], words, ["error"]

    def _file(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Give a damaged file, or the usable one with damaged bytes."""
        usable = yaml.safe_dump(base).encode() if base else b""
        if self.rng.random() < 0.5:
            content = bytearray(usable)
            for _ in range(self.rng.randint(1, 4) if content else 0):
                place = self.rng.randrange(len(content))
                edit = self.rng.choice(["flip", "cut", "insert"])
                if edit == "flip":
                    content[place] ^= 1 << self.rng.randrange(8)
                elif edit == "cut":
                    del content[place:]
                    content += b"x"
                else:
                    content[place:place] = self.rng.choice(
                        [b"\x00", b"\xff", b"&", b"*", b"[", b": "]
                    )
            return self._with_file(command, bytes(content), ANY)
        content = FILES[self.rng.choice(list(FILES))]
        if content.startswith(b"{}"):
            content = usable + content[2:]
        return self._with_file(command, content, ANY)

    def _place(self, command: str, base: dict[str, Any]) -> tuple[str, list[str], list[str]]:
        """Give something that is no file."""
        place = self.rng.choice(PLACES)
        path = place if place.startswith("/") or not place else str(self.folder / place)
        return f"--config {place!r}", [command, "--config", path], ["--config", "is missing"]

    def _with_file(
        self, command: str, content: bytes, names: list[str]
    ) -> tuple[str, list[str], list[str]]:
        path = self.folder / "settings.yaml"
        path.write_bytes(content)
        text = repr(content[-200:] if len(content) > 400 else content)
        return text, [command, "--config", str(path)], [*names, "settings.yaml: line"]


def make_places(folder: Path) -> None:
    """Make what --config should not be."""
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "unreadable").write_text("model: a\n")
    (folder / "unreadable").chmod(0)


def judge(words: list[str], names: list[str]) -> tuple[str, str]:
    """Run a mutation; return (verdict, detail); verdicts "accepted" and "refused" are good."""
    accepted.clear()
    result = in_process(lambda: cli.main(words), timeout=LIMIT)
    err = result.err
    lines = err.splitlines()
    if result.timed_out:
        return "hang", f"{result.seconds:.0f} s"
    if result.has_traceback:
        return "traceback", " / ".join(lines[-4:])[:400]
    if any(secret in err for secret in SECRETS):
        return "a secret is told", err[:300]
    if result.code == 0:
        problem = insane(accepted[0]) if accepted else None
        return ("accepted nonsense", problem) if problem else ("accepted", "")
    if result.code not in (1, 2):
        return f"status {result.code}", err[:300]
    if len(lines) != 1 or len(err) > LONGEST or not err.rstrip("\n").isprintable():
        return "not one printable line", repr(err[:400])
    if not err.startswith("una-fast") or ": error: " not in err:
        return "no error line", err[:300]
    if not any(name in err for name in names):
        return "names nothing", err[:300]
    return "refused", ""


def run(trial: Trial) -> None:
    """Try mutations drawn by the seed, and count them."""
    folder = trial.new_folder("settings")
    make_places(folder)
    with replaced_commands(), contextlib.chdir(folder):
        _run(trial, folder)


def _run(trial: Trial, folder: Path) -> None:
    mutator = Mutator(trial.seed, folder)
    counts: Counter[str] = Counter()
    for _ in range(SHORT if trial.short else MUTATIONS):
        description, words, names = mutator.next()
        verdict, detail = judge(words, names)
        counts[verdict] += 1
        if verdict not in ("accepted", "refused"):
            trial.report(f"{verdict}: {detail!a}", False, ascii(description)[:300])
    trial.report("no foreign code ran", not (folder / "PWNED").exists(), str(dict(counts)))
    trial.total += counts["accepted"] + counts["refused"]


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
