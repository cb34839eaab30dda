#!/usr/bin/env python3
"""Small faults, each by itself: kills between two writes, quotas, files of two checkpoints mixed,
a second run in one directory, log-probs of another model, weights that are not finite.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    Command,
    Result,
    Trial,
    as_words,
    differences,
    forked,
    lines_in,
    main,
    metrics_of,
    preload,
    train_words,
    una_fast,
    weights_digest,
)
from damage import stopped_run

from una_fast.train.run_dir import LOCK


class Runs:
    """Runs of one configuration: whole, stopped after step 8, and gone on with."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.root = trial.new_folder("small")
        self.words = train_words(trial.fixtures, save_every=4)
        self.truth = self.root / "truth"
        result = self.start(self.truth)
        assert result.kind == "ok", result.err
        self.template = self.root / "template"
        stopped_run([*self.words, "--output_dir", self.template], 8)

    def start(self, out: Path, **settings: Any) -> Result:
        """Run the configuration with other settings in a directory."""
        return una_fast([*self.words, "--output_dir", out, *as_words(settings)])

    def resume(self, out: Path, **settings: Any) -> Result:
        return self.start(out, resume="true", **settings)

    def stopped(self, name: str) -> Path:
        """Return the directory of a run that was killed after step 8."""
        out = self.root / name
        shutil.copytree(self.template, out)
        return out

    def ends_well(self, name: str, out: Path, result: Result, note: str = "") -> None:
        """Report whether a run came to its true end, or was refused in one line."""
        wrong = differences(out, self.truth) if result.kind == "ok" else ""
        good = result.kind == "refusal" or (result.kind == "ok" and not wrong)
        ending = f"{wrong} differ" if wrong else result.last[:120]
        self.trial.report(name, good, f"{result.kind:8} {ending} {note}")


def run(trial: Trial) -> None:
    """Try every fault."""
    preload()
    runs = Runs(trial)
    faults = [value for name, value in globals().items() if name.startswith("fault_")]
    for fault in trial.some(faults, 4, "fault"):
        fault(runs)


# ---- metrics.jsonl at a resume ----


def fault_killed_in_a_resume(runs: Runs) -> None:
    """Killed before and after every truncation and every restoring copy of a resume."""
    for function in ("os.truncate", "shutil.copyfile"):
        for when in ("before", "after"):
            out = runs.stopped(f"{function}-{when}")
            with (out / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "of": "a step to be taken again"}\n')
            if function == "shutil.copyfile":
                (out / "metrics.jsonl").write_text("cut")
            words = [*runs.words, "--output_dir", out, "--resume", "true"]
            forked(lambda f=function, w=when, x=words: _killed_at(f, w, x))
            runs.ends_well(f"killed {when} {function} of a resume", out, runs.resume(out))


def _killed_at(function: str, when: str, words: list[str]) -> int:
    from una_fast.cli import main as una_fast_main

    module = {"os": os, "shutil": shutil}[function.partition(".")[0]]
    name = function.partition(".")[2]
    original = getattr(module, name)

    def dying(path: Any, *rest: Any, **options: Any) -> Any:
        if "metrics.jsonl" not in str(path):
            return original(path, *rest, **options)
        if when == "after":
            original(path, *rest, **options)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, dying)
    return una_fast_main([str(word) for word in words])


def fault_resumed_under_a_quota(runs: Runs) -> None:
    out = runs.stopped("quota")
    before = lines_in(out / "metrics.jsonl")

    def limited() -> int:
        from una_fast.cli import main as una_fast_main

        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        words = [*runs.words, "--output_dir", out, "--resume", "true"]
        return una_fast_main([str(word) for word in words])

    result = forked(limited)
    left = lines_in(out / "metrics.jsonl")
    good = left >= 8 and (result.kind == "ok" or str(out) in result.last)
    runs.trial.report("resumed under a quota", good, result.last[:120])
    runs.ends_well("  then without", out, runs.resume(out), f"lines {before} -> {left}")


# ---- files that do not belong together ----


def fault_another_step_in_the_state(runs: Runs) -> None:
    out = runs.stopped("state")
    path = out / "checkpoint-8" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 6}))
    runs.ends_well("state.json says step 6 in checkpoint-8", out, runs.resume(out))


def fault_training_state_of_another_checkpoint(runs: Runs) -> None:
    out = runs.stopped("mixed")
    shutil.rmtree(out / "checkpoint-8" / "training")
    shutil.copytree(out / "checkpoint-4" / "training", out / "checkpoint-8" / "training")
    runs.ends_well("training/ of checkpoint-4 in checkpoint-8", out, runs.resume(out))


def fault_a_checkpoint_under_another_name(runs: Runs) -> None:
    out = runs.stopped("renamed")
    (out / "checkpoint-8").rename(out / "checkpoint-11")
    runs.ends_well("checkpoint-8 renamed to checkpoint-11", out, runs.resume(out))


def fault_a_manifest_of_another_run(runs: Runs) -> None:
    """A whole checkpoint of a run with another seed."""
    other = runs.root / "other-run"
    stopped_run([*runs.words, "--seed", "5", "--output_dir", other], 8)
    out = runs.stopped("foreign")
    shutil.rmtree(out / "checkpoint-8")
    shutil.copytree(other / "checkpoint-8", out / "checkpoint-8")
    result = runs.resume(out)
    runs.trial.report(
        "checkpoint-8 of another run",
        result.kind == "refusal",
        f"{result.kind} {result.last[:120]}",
    )


def _without_a_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def fault_a_weight_missing_from_a_checkpoint(runs: Runs) -> None:
    out = runs.stopped("tensor")
    _without_a_weight(out / "checkpoint-8" / "model.safetensors")
    runs.ends_well("a weight missing from a checkpoint", out, runs.resume(out))


def fault_a_weight_missing_from_a_model(runs: Runs) -> None:
    model = runs.root / "model"
    shutil.copytree(runs.trial.fixtures.model, model)
    _without_a_weight(model / "model.safetensors")
    result = runs.start(runs.root / "without", model=model, max_steps=2)
    named = result.kind == "refusal" and "up_proj" in result.last
    runs.trial.report("a weight missing from a model", named, f"{result.kind} {result.last[:120]}")


def fault_the_model_has_moved(runs: Runs) -> None:
    model = runs.root / "moved-model"
    shutil.copytree(runs.trial.fixtures.model, model)
    out = runs.stopped("moved")
    result = runs.resume(out, model=model)
    good = result.kind == "ok" and not differences(out, runs.truth)
    runs.trial.report("resumed with the same model elsewhere", good, result.last[:120])


# ---- one directory ----


def fault_two_runs_in_one_directory(runs: Runs) -> None:
    out = runs.root / "two"
    words = [*runs.words, "--output_dir", out, "--resume", "true", "--epochs", "3"]
    commands = [Command(words, runs.root / f"two-{k}.log") for k in range(2)]
    results = [command.wait() for command in commands]
    steps = [row["step"] for row in metrics_of(out)]
    codes = [result.code for result in results]
    good = codes.count(0) <= 1 and len(steps) == len(set(steps)) == 36
    good = good and all(result.is_clear for result in results)
    runs.trial.report("two runs in one directory", good, f"exits {codes}, {len(steps)} lines")


def fault_resumed_after_the_end(runs: Runs) -> None:
    out = runs.root / "again"
    shutil.copytree(runs.truth, out)
    before = _times_of(out)
    result = runs.resume(out)
    after = _times_of(out)
    runs.trial.report("resumed after its end", result.kind == "ok" and before == after, result.last)


def _times_of(out: Path) -> dict[Path, int]:
    """Return when the files of a run were last written; the lock is taken by every start."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK]
    return {path: path.stat().st_mtime_ns for path in files}


def fault_more_epochs(runs: Runs) -> None:
    out = runs.stopped("epochs")
    result = runs.resume(out, epochs=3)
    good = result.kind == "refusal" or "epochs" in result.err
    runs.trial.report("resumed with other epochs", good, f"{result.kind} {result.last[:120]}")


# ---- reference log-probs ----


def _precomputed(runs: Runs, name: str, model: Path) -> Path:
    """Return the new file of `pairs`, with log-probs of a model."""
    out = runs.root / name
    settings = {"model": model, "data": runs.trial.fixtures.pairs, "device": "cpu"}
    result = una_fast(["precompute-ref", *as_words({**settings, "output_dir": out})])
    assert result.kind == "ok", result.err
    return out / "data-00-pairs.jsonl"


def _other_model(runs: Runs) -> Path:
    def save() -> None:
        import tiny

        tiny.save_llama(runs.root / "other", seed=9)

    if not (runs.root / "other").exists():
        forked(save)
    return runs.root / "other"


def _refused(runs: Runs, name: str, data: Path) -> None:
    """Report whether a run on a data file is refused by its ref_logps."""
    out = runs.root / f"{data.stem}-{runs.trial.total}"
    result = runs.start(out, data=data, max_steps=1)
    good = result.kind == "refusal" and "ref_logps" in result.last
    runs.trial.report(name, good, f"{result.kind} {result.last[:140]}")


def fault_log_probs_of_another_model(runs: Runs) -> None:
    data = _precomputed(runs, "foreign-ref", _other_model(runs))
    _refused(runs, "ref_logps of another model", data)
    data.with_name(data.name + ".ref.json").unlink()
    _refused(runs, "  without the sidecar", data)


def fault_log_probs_that_are_no_log_probs(runs: Runs) -> None:
    lines = runs.trial.fixtures.pairs.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for value in ([3.0, 2.0], [0.0, 0.0], [-1e300, -1.0], [-1.0], "x", [None, None], True):
        data = runs.root / "made-up.jsonl"
        made_up = [json.dumps({**row, "ref_logps": value}) + "\n" for row in rows]
        data.write_text("".join(made_up))
        _refused(runs, f"ref_logps {json.dumps(value)}", data)


def fault_a_cut_data_file(runs: Runs) -> None:
    """Cut at the end of a line, where nothing in the file itself shows it."""
    data = _precomputed(runs, "cut-ref", runs.trial.fixtures.model)
    lines = data.read_bytes().splitlines(keepends=True)
    data.write_bytes(b"".join(lines[:20]))
    _refused(runs, "a data file cut at a line's end", data)


# ---- numbers ----


def fault_an_infinite_setting(runs: Runs) -> None:
    config = runs.root / "inf.yaml"
    config.write_text("weight_decay: .inf\n")
    out = runs.root / "inf"
    result = una_fast([*runs.words, "--config", config, "--output_dir", out])
    good = result.kind in ("refusal", "usage") and not weights_digest(out)
    runs.trial.report("weight_decay .inf", good, f"{result.kind} {result.last[:120]}")


def fault_a_step_that_overflows(runs: Runs) -> None:
    """Weights that are not finite are never saved, at whatever step they would come up."""
    out = runs.root / "overflow"
    settings = {"learning_rate": 1e38, "max_grad_norm": "null", "optimizer": "sgd", "save_every": 1}
    result = runs.start(out, **settings)
    good = result.kind in ("ok", "refusal") and _all_finite(out)
    runs.trial.report("a learning rate of 1e38", good, f"{result.kind} {result.last[:120]}")


def _all_finite(out: Path) -> bool:
    from safetensors.torch import load_file

    tensors: Callable[[Path], Any] = lambda file: load_file(file).values()  # noqa: E731
    files = [*out.rglob("model.safetensors")]
    return all(bool(tensor.isfinite().all()) for file in files for tensor in tensors(file))


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
