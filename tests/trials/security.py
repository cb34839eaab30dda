#!/usr/bin/env python3
"""Try to run foreign code, to take secrets out, and to write on the reader's terminal.

    .venv/bin/python tests/trials/security.py [--seed N] [--short]

Pickles in the place of every file of a checkpoint, also with a manifest that fits; pickles and
code in model, adapter and tokenizer directories; chat templates; names and places of data; escape
sequences in column names; secrets of URLs; and modules of the working directory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SCRIPTS, Fixtures, Result, Trial, main, online_words, preload, train_words
from common import una_fast as una

SECRETS = ("PASSW0RD", "QUERYKEY")

PACKAGE = Path(__file__).resolve().parents[2] / "una_fast"

# Modules that a command, or a package that it loads, imports or looks for.
SHADOWED = (
    "torch transformers yaml json una_fast sitecustomize usercustomize numpy httpx peft datasets",
    "my_settings wandb flash_attn vllm trackio liger_kernel apex deepspeed IPython sentencepiece",
    "bitsandbytes sklearn safetensors tqdm argparse tokenizers accelerate triton torchao pandas",
    "PIL scipy requests kernels rich matplotlib tensorboard sympy jinja2 regex packaging orjson",
)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return (os.system, (f"touch {self.mark}",))


class Attack:
    """A folder of its own, and the mark that foreign code would leave there."""

    def __init__(self, trial: Trial, name: str) -> None:
        self.trial = trial
        self.root = trial.new_folder(name)
        self.mark = self.root / "PWNED"
        self.made = 0

    def report(self, name: str, good: object, note: object = "") -> None:
        """Count a case: it must be good, and no foreign code may have run."""
        ran = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        self.trial.report(name, good and not ran, f"{'CODE RAN; ' * ran}{note}"[:160])

    def clear(self, name: str, result: Result, *kinds: str) -> None:
        """Count a command that must end in one of some kinds (default: any clear one)."""
        good = result.is_clear and (not kinds or result.kind in kinds)
        self.report(name, good, f"{result.kind} {result.seconds:.0f} s: {result.last!a}")

    def code(self) -> str:
        """Return Python that leaves the mark."""
        return f"open({str(self.mark)!r}, 'w')\n"

    def model(self, name: str) -> Path:
        """Return a copy of the model of the trials."""
        return Path(shutil.copytree(self.trial.fixtures.model, self.root / name))

    def train(self, timeout: float = 60.0, **settings: Any) -> Result:
        """Train two steps, with settings, into a new directory."""
        self.made += 1
        given = {"max_steps": 2, "output_dir": self.root / f"out{self.made}", **settings}
        return una(train_words(self.trial.fixtures, **given), cwd=self.root, timeout=timeout)


def run(trial: Trial) -> None:
    """Try everything."""
    preload()
    for part in (checkpoints, models, templates, data, escapes, secrets, modules, source):
        part(Attack(trial, part.__name__))


# ---- pickles -----------------------------------------------------------------------------------

PLANTED = (
    "training/.metadata",
    "training/__0_0.distcp",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
)


def checkpoints(attack: Attack) -> None:
    """Replace every file of a checkpoint by a pickle, and plant the names of other trainers."""
    words = {"save_every": 2, "max_steps": 2}
    for kind, settings in (("full", {}), ("lora", {"lora.r": 2})):
        good = attack.root / f"good-{kind}"
        made = una(train_words(attack.trial.fixtures, output_dir=good, **words, **settings))
        attack.clear(f"a {kind} run", made, "ok")
        below = good / "checkpoint-2"
        names = [str(p.relative_to(below)) for p in below.rglob("*") if p.is_file()]
        names = attack.trial.some([*names, *PLANTED], 4, kind)
        for name in names:
            for fits in (False, True):
                out = Path(shutil.copytree(good, attack.root / "resumed"))
                (out / "COMPLETE").unlink(missing_ok=True)  # so that the checkpoint is read
                _plant(attack, out / "checkpoint-2", name, fits)
                again = {**words, **settings, "max_steps": 3, "resume": "true"}
                result = una(train_words(attack.trial.fixtures, output_dir=out, **again))
                shutil.rmtree(out)
                known = "with a manifest that fits" if fits else "alone"
                attack.clear(f"{kind}: a pickle as {name}, {known}", result)


def _plant(attack: Attack, checkpoint: Path, name: str, fits: bool) -> None:
    """Write a pickle into a checkpoint; `fits`: into its manifest, too."""
    path = checkpoint / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix in (".pt", ".pth", ".bin", ".distcp"):
        torch.save({"x": Evil(attack.mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(attack.mark)))
    if fits and name != "COMPLETE":
        from una_fast.train.manifest import Manifest, hash_files

        old = Manifest.read(checkpoint)
        files = hash_files(checkpoint, sorted({*old.files, name}))
        Manifest(old.step, old.run, files, old.result).write(checkpoint)


def models(attack: Attack) -> None:
    """Put pickles and code into model, tokenizer and adapter directories."""

    def change(path: Path, **values: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def check(name: str, directory: Path, *kinds: str) -> None:
        result = una(["check", "--model", directory], cwd=attack.root, timeout=60)
        attack.clear(name, result, *kinds)

    binary = attack.model("binary")
    (binary / "model.safetensors").unlink()
    torch.save({"x": Evil(attack.mark)}, binary / "pytorch_model.bin")
    check("model: a pickle in pytorch_model.bin", binary, "refusal")

    remote = attack.model("remote")
    change(
        remote / "config.json",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        model_type="evilmodel",
    )
    (remote / "evil.py").write_text(attack.code())
    check("model: code of its own (auto_map)", remote, "refusal")
    attack.clear("train: the same", attack.train(model=remote), "refusal")

    tokenizer = attack.model("tokenizer")
    change(
        tokenizer / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        tokenizer_class="EvilTokenizer",
    )
    (tokenizer / "evil.py").write_text(attack.code())
    check("tokenizer: code of its own (auto_map)", tokenizer)

    adapter = attack.root / "adapter"
    adapter.mkdir()
    (attack.root / "evilmod.py").write_text(attack.code())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(attack.trial.fixtures.model / name, adapter)
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    base = {"base_model_name_or_path": str(attack.trial.fixtures.model)}
    mapping = {"auto_mapping": {"base_model_class": "X", "parent_library": "evilmod"}}
    (adapter / "adapter_config.json").write_text(json.dumps(lora | base | mapping))
    torch.save({"x": Evil(attack.mark)}, adapter / "adapter_model.bin")
    check("adapter: a pickle in adapter_model.bin, and auto_mapping", adapter, "refusal")
    base = {"base_model_name_or_path": str(remote)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora | base))
    check("adapter: a base with code of its own", adapter, "refusal")


# ---- templates and data ------------------------------------------------------------------------

TEMPLATES = {
    "reaches __subclasses__": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "calls os.system": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "formats attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "loops without end": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "is 2 GB long": "{{ 'x' * 2000000000 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "includes a file": "{% include '/etc/passwd' %}",
}


def templates(attack: Attack) -> None:
    """Train on chats with chat templates that attack."""
    chats = attack.root / "chats.jsonl"
    question = {"role": "user", "content": "why"}
    answer = {"role": "assistant", "content": "rain"}
    chats.write_text(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")
    for number, (name, text) in enumerate(TEMPLATES.items()):
        model = attack.model(f"template{number}")
        (model / "chat_template.jinja").write_text(text.replace("MARK", str(attack.mark)))
        result = attack.train(model=model, data=chats, timeout=30)
        attack.report(
            f"a chat template {name}",
            result.kind == "refusal" and "<class" not in result.err,
            f"{result.kind} {result.seconds:.0f} s: {result.last!a}",
        )


NAMES = ("json", "csv", "pickle", "text:../../etc/passwd", "a/../../etc", "-x", "org/name:..")
NAMES += ("generator", "spark", "\u202eevil", "parquet", "webdataset", "file:///etc/passwd")
NAMES += ("https://127.0.0.1:9/x.jsonl", "/etc/passwd", "/dev/zero", "/proc/self/mem", "")


def data(attack: Attack) -> None:
    """Name scripts, devices, links and builders of `datasets` as data."""
    for name in ("directory", "script"):
        place = attack.root / name
        place.mkdir()
        (place / f"{name}.py").write_text(attack.code())
        given = place if name == "directory" else name
        attack.clear(f"data: {name} with a script in it", attack.train(data=given), "refusal")
    for name in attack.trial.some(NAMES, 5, "names"):
        result = attack.train(data=json.dumps([name]), timeout=30)
        attack.clear(f"data: {name!a}", result, "refusal", "usage")
    linked = attack.root / "linked"
    linked.mkdir()
    (linked / "a.jsonl").symlink_to("/etc/passwd")
    attack.clear("data: a link out of the directory", attack.train(data=linked), "refusal")
    fifo = attack.root / "fifo.jsonl"
    os.mkfifo(fifo)
    attack.clear("data: a FIFO", attack.train(data=fifo, timeout=20), "refusal")


# ---- terminals, cards and secrets --------------------------------------------------------------

ESCAPES = ("\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\r", "\x08", "\u202e", "\u2028", "\n")
FORGED = "\n---\nlicense: evil\n"


def _is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def escapes(attack: Attack) -> None:
    """Give column names and values that act on a terminal, or break out of the model card."""
    path = attack.root / "escapes.jsonl"
    for escape in ESCAPES:
        path.write_text(json.dumps({f"prompt{escape}": "x", f"a{escape}b": 1}) + "\n")
        result = attack.train(data=path)
        one_line = _is_safe(result.err) and result.err.count("\n") == 1
        attack.report(f"a refused column with {escape!a}", one_line, ascii(result.err))
    for number, name in enumerate([f"q{escape}{FORGED}" for escape in ESCAPES] + ["|<img src=x>["]):
        path.write_text(json.dumps({"prompt": "x", "completion": "sat", name: 1}) + "\n")
        out = attack.root / f"card{number}"
        result = attack.train(data=path, output_dir=out)
        card = (out / "README.md").read_text() if result.code == 0 else "license: evil"
        forged = re.search(r"^license: evil|(?<!\\)<img|(?<!\\)\|<", card, re.M)
        safe = _is_safe(result.out + result.err) and _is_safe(card) and not forged
        attack.report(f"an ignored column {name[:12]!a} in card and terminal", safe, result.last)
    names = attack.root / 'a "b"\n- c: d'
    shutil.copytree(attack.trial.fixtures.model, names)
    out = attack.root / "cardpath"
    result = attack.train(model=names, output_dir=out)
    card = (out / "README.md").read_text() if result.code == 0 else ""
    import yaml

    front = yaml.safe_load(card.split("---")[1]) if card else {}
    attack.report(
        "a model path with YAML in it",
        result.is_clear and (result.code != 0 or set(front) == set(FRONT)),
        f"{result.kind}: {result.last!a}",
    )


FRONT = ("base_model", "library_name", "tags")


def secrets(attack: Attack) -> None:
    """Look for the secrets of URLs in what is printed and written."""
    os.umask(0o022)
    password, key = SECRETS
    urls = [
        f"http://user:{password}@127.0.0.1:9/?key={key}",
        f"http://user:{password}@127.0.0.1:99999/?key={key}",
        f"http://{password}@127.0.0.1:9/v1?{key}",
        f"ftp://user:{password}@127.0.0.1/",
        f"http://user:{password}@nowhere.invalid/v1?a=b&token={key}",
        f"http://user:{password}p@ss@127.0.0.1:9/",
    ]
    for number, url in enumerate(urls):
        for kind in ("endpoint", "judge"):
            out = attack.root / f"secrets{number}{kind}"
            entry = {kind: url, "retries": 0, "timeout": 2}
            if kind == "judge":
                entry["judge_model"] = "j"
            rewards = json.dumps([entry, f"{attack.trial.fixtures.rewards}:length"])
            words = online_words(
                attack.trial.fixtures, rewards=rewards, output_dir=out, max_steps=1, batch_size=2
            )
            result = una(words, cwd=attack.root, timeout=60)
            told = [secret for secret in SECRETS if secret in result.out + result.err]
            kept = _files_with(out, SECRETS)
            name = f"{kind} {url.split('@')[-1]}"
            attack.report(
                f"secrets of {name}",
                result.is_clear and not told and not kept,
                f"{result.kind}, told {told}, kept {kept}: {result.last!a}",
            )
            config = out / "config.yaml"
            if config.exists():
                mode = stat.S_IMODE(config.stat().st_mode)
                attack.report(f"mode of config.yaml, {name}", mode == 0o600, oct(mode))
                again = una(["train", "--config", config, "--output_dir", attack.root / "again"])
                attack.clear(f"config.yaml again, {name}", again, "refusal")


def _files_with(directory: Path, words: tuple[str, ...]) -> list[str]:
    """Return the files below a directory that hold one of some words."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(word.encode() in content for word in words):
                found.append(path.name)
    return found


# ---- modules of the working directory, and the source ------------------------------------------


def modules(attack: Attack) -> None:
    """Start the real command in a directory full of modules with known names."""
    here = attack.root / "here"
    (here / "kernels").mkdir(parents=True)
    for name in " ".join(SHADOWED).split():
        text = f"open({str(attack.mark)!r}, 'a').write({name!r} + chr(10))\nraise ImportError\n"
        (here / f"{name}.py").write_text(text)
    (here / "kernels" / "__init__.py").write_text(attack.code())
    shutil.copy(attack.trial.fixtures.rewards, here)
    fixtures: Fixtures = attack.trial.fixtures
    command = SCRIPTS / "una-fast"
    launcher = [SCRIPTS / "torchrun", "--nproc-per-node=1", "--master-port=29556", "--no-python"]
    online = {"max_steps": 1, "batch_size": 2, "rewards": "[my_rewards.length]"}
    trials = {
        "check": [command, "check", "--model", fixtures.model],
        "train": [command, *train_words(fixtures, output_dir=attack.root / "o1", max_steps=1)],
        "online, a dotted reward": [
            command,
            *online_words(fixtures, output_dir=attack.root / "o2", **online),
        ],
        "plan": [command, "plan", "--op", "64", "32", "100"],
        "torchrun --no-python": [*launcher, command, "check"],
    }
    for name, words in trials.items():
        done = subprocess.run(
            [str(word) for word in words], cwd=here, capture_output=True, text=True, timeout=300
        )
        loaded = attack.mark.read_text().split() if attack.mark.exists() else []
        note = f"loaded {loaded}, exit {done.returncode} {done.stderr[-100:]!a}"
        attack.report(f"modules of the working directory: {name}", done.returncode == 0, note)


UNSAFE = re.compile(
    r"yaml\.(load|unsafe_load|full_load)\(|pickle\.\w|torch\.load\((?!.*weights_only=True)"
    r"|\beval\(['\"a-z]+\)|\bexec\(|os\.system|shell=True|trust_remote_code=True|mktemp\("
)


def source(attack: Attack) -> None:
    """Look for unsafe calls in the source."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if UNSAFE.search(line) and ".eval()" not in line:
                found.append(f"{path.name}:{number}")
    attack.report("unsafe calls in the source", not found, found)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
