#!/usr/bin/env python3
"""Damage every file of the newest checkpoint in every way, and resume, an older one beside it.

Allowed are the true end of the run (from the older checkpoint, where the file matters) and a
refusal of one line. A run that ends with other weights or metrics has failed silently.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from common import Result, Trial, differences, forked, main, preload, train_words, una_fast

INDEX = "model.safetensors.index.json"


def stopped_run(words: list[str], step: int, *, logs: Path | None = None) -> Result:
    """Run a command that is killed right after the checkpoint of a step is complete."""

    def command() -> int:
        from una_fast.cli import main as una_fast_main
        from una_fast.train.loop import Trainer

        save = Trainer.save

        def save_and_die(self, number: int) -> None:
            save(self, number)
            if number == step:
                self.saver.finish()
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer.save = save_and_die
        return una_fast_main([str(word) for word in words])

    return forked(command, logs=logs)


# ---- damages: content of a file, and of its older version -> new content, None to remove ----

Damage = Callable[[bytes, bytes], bytes | None]


def flipped(content: bytes, bit: int) -> bytes:
    """Return the content with one bit flipped."""
    if not content:
        return b"x"
    changed = bytearray(content)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


def damages(trial: Trial, name: str) -> dict[str, Damage]:
    """Return the damages of a file by name; bits and garbage are drawn by the seed."""
    rng = trial.rng("damage", name)
    bit = rng.randrange(2**40)
    garbage = rng.randbytes(64)
    return {
        "missing": lambda now, old: None,
        "empty": lambda now, old: b"",
        "half": lambda now, old: now[: len(now) // 2],
        "a byte short": lambda now, old: now[:-1],
        "longer": lambda now, old: now + b"\n",
        "zeroed": lambda now, old: bytes(len(now)),
        "a bit": lambda now, old: flipped(now, bit),
        "garbage": lambda now, old: garbage * (len(now) // 64 + 1),
        "older": lambda now, old: old,
    }


def added_files(newest: Path) -> dict[str, Callable[[], None]]:
    """Return ways to put files of others beside the weights."""

    def add(name: str) -> Callable[[], None]:
        def copy() -> None:
            weights = next(newest.glob("*model.safetensors"))
            shutil.copyfile(weights, newest / name)

        return copy

    return {f"added {name}": add(name) for name in ("pytorch_model.bin", "more.safetensors", INDEX)}


def run(trial: Trial) -> None:
    """Damage the checkpoints of a full run, and in the long form of a LoRA run."""
    preload()
    fixtures = trial.fixtures
    damage_all(trial, "full", train_words(fixtures, save_every=4))
    if not trial.short:
        damage_all(trial, "lora", train_words(fixtures, save_every=4, **{"lora.r": 4}))


def damage_all(trial: Trial, kind: str, words: list[str]) -> None:
    """Damage the newest checkpoint of a run that was killed after step 8.

    kind: for the names of the cases
    words: of the run, without an output directory
    """
    root = trial.new_folder(f"damage-{kind}")
    truth, stopped, out = (root / name for name in ("truth", "stopped", "case"))
    result = una_fast([*words, "--output_dir", truth])
    assert result.kind == "ok", result.err
    stopped_run([*words, "--output_dir", stopped], 8)
    newest, older = stopped / "checkpoint-8", stopped / "checkpoint-4"
    assert (newest / "COMPLETE").exists() and (older / "COMPLETE").exists()

    def attempt(name: str, damage: Callable[[], None]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        damage()
        result = una_fast([*words, "--output_dir", out, "--resume", "true"], timeout=120)
        wrong = differences(out, truth) if result.kind == "ok" else ""
        good = result.kind == "refusal" or (result.kind == "ok" and not wrong)
        note = f"{wrong} differ" if wrong else result.last[:160]
        trial.report(f"{kind}: {name}", good, f"{result.kind:8} {note}")

    def damaged(file: str, damage: Damage) -> Callable[[], None]:
        def apply() -> None:
            path = out / file
            old = older / Path(file).relative_to("checkpoint-8") if "/" in file else path
            content = damage(path.read_bytes(), old.read_bytes() if old.exists() else b"")
            path.unlink()
            if content is not None:
                path.write_bytes(content)

        return apply

    cases = []
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for file in [*(str(path.relative_to(stopped)) for path in files), "metrics.jsonl"]:
        for how, damage in damages(trial, file).items():
            if (file, how) != ("metrics.jsonl", "older"):
                cases.append((f"{file}: {how}", damaged(file, damage)))
    cases += added_files(out / "checkpoint-8").items()
    cases.append(("both checkpoints without weights", lambda: remove_weights(out)))
    for name, damage in trial.some(cases, 2, kind):
        attempt(name, damage)


def remove_weights(out: Path) -> None:
    for path in out.glob("checkpoint-*/*model.safetensors"):
        path.unlink()


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
