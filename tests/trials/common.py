"""Shared by the trials: fixtures, una-fast in forked children and under torchrun, and a tally.

A trial is a script with a function `run(trial)` that ends in

    if __name__ == "__main__":
        sys.exit(main(run, __doc__))

`python tests/trials/NAME.py [--seed N] [--short]` prints a line per case, the faults marked FAIL,
and last `SURVIVED n/N`; it exits with 0 if nothing failed. All files are in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
sys.path.append(str(TESTS))  # for `tiny`; last, so that no module of the tests hides another

TIMING = ("tok_per_sec", "memory/peak_gib", "mfu", "padding", "eval_padding")
TIMING += ("time/generate", "time/reward", "time/train", "eval_time/generate", "eval_time/reward")


# ---- a trial and its tally ---------------------------------------------------------------------


@dataclass
class Trial:
    """A trial under way.

    root: folder for its files
    seed: of everything that is drawn
    short: a few cases of every kind instead of all
    failures: names of the cases that failed
    figures: measured numbers, for the result
    """

    root: Path
    seed: int = 0
    short: bool = False
    total: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    _fixtures: Fixtures | None = None

    def report(self, name: str, good: object, note: str = "") -> None:
        """Count a case, and print its line."""
        self.total += 1
        if not good:
            self.failures.append(name)
        print(f"{'    ' if good else 'FAIL'} {name:56} {note}".rstrip(), flush=True)

    def rng(self, *key: object) -> random.Random:
        """Return random numbers that depend on the seed and a key."""
        return random.Random(repr((self.seed, *key)))

    def some(self, items: Sequence[Any], count: int, *key: object) -> list[Any]:
        """Return all items; in the short form `count` of them, drawn by the seed."""
        if not self.short or len(items) <= count:
            return list(items)
        drawn = self.rng("some", *key).sample(range(len(items)), count)
        return [items[k] for k in sorted(drawn)]

    @property
    def fixtures(self) -> Fixtures:
        """Return the model and the data of the trials, made once."""
        if self._fixtures is None:
            self._fixtures = make_fixtures(self.root / "fixtures")
        return self._fixtures

    def new_folder(self, name: str) -> Path:
        """Return an empty folder of this name."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def main(run: Callable[[Trial], None], description: str | None) -> int:
    """Run a trial with the arguments of the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few cases of every kind")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    options = parser.parse_args()
    # A shell's background and nohup ignore them, and commands would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    root = Path(tempfile.mkdtemp(prefix="una-trial-"))
    start = time.monotonic()
    try:
        trial = Trial(root, options.seed, options.short)
        run(trial)
    finally:
        if options.keep:
            print(f"# files are in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(f"SURVIVED {trial.total - len(trial.failures)}/{trial.total}", flush=True)
    if options.out:
        seconds = round(time.monotonic() - start)
        content = {"command": " ".join(sys.argv), "seconds": seconds, **result_of(trial)}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(bool(trial.failures))


def result_of(trial: Trial) -> dict[str, Any]:
    """Return the result of a trial, with the versions and the machine, as JSON values."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=TESTS, capture_output=True, text=True
    )
    return {
        "seed": trial.seed,
        "short": trial.short,
        "cases": trial.total,
        "failures": trial.failures,
        **trial.figures,
        "commit": commit.stdout.strip(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{os.cpu_count()} cores, {os.uname().machine}",
    }


# ---- fixtures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixtures:
    """A tiny model, and data for it.

    model: directory of a random two-layer Llama with its tokenizer
    mixed: 48 records of every kind
    pairs: 32 pairs
    evaluation: 8 records
    prompts: 16 prompts
    rewards: file of the reward function `length`
    """

    root: Path
    model: Path
    mixed: Path
    pairs: Path
    evaluation: Path
    prompts: Path
    rewards: Path


REWARDS = """\
def length(completions, **_):
    return [min(len(text), 40) / 40 for text in completions]
"""


def make_fixtures(root: Path) -> Fixtures:
    """Write the fixtures, in a child: threads of torch would not survive the forks that follow."""
    names = ("model", "mixed.jsonl", "pairs.jsonl", "eval.jsonl", "prompts.jsonl", "my_rewards.py")
    made = Fixtures(root, *(root / name for name in names))

    def write() -> None:
        import tiny

        root.mkdir(parents=True)
        tiny.save_llama(made.model)
        tiny.write_jsonl(made.mixed, tiny.make_records("mixed", 48, seed=1))
        tiny.write_jsonl(made.pairs, tiny.make_records("pairs", 32, seed=2))
        tiny.write_jsonl(made.evaluation, tiny.make_records("mixed", 8, seed=3))
        prompts = []
        for number, record in enumerate(tiny.make_records("pairs", 16, seed=4)):
            prompts.append({"prompt": record["prompt"], "topic": str(number)})
        tiny.write_jsonl(made.prompts, prompts)
        made.rewards.write_text(REWARDS, encoding="utf-8")

    result = forked(write, logs=root.parent, timeout=600)
    assert result.code == 0, result.err
    return made


def train_words(fixtures: Fixtures, **settings: Any) -> list[str]:
    """Return the words of a quiet training run on the CPU, with settings."""
    quiet = {
        "model": fixtures.model,
        "data": fixtures.mixed,
        "device": "cpu",
        "progress": "false",
        "write_report": "false",
        "loggers": "[]",
        "batch_size": 4,
        "learning_rate": 1e-3,
    }
    return ["train", *as_words({**quiet, **settings})]


def online_words(fixtures: Fixtures, **settings: Any) -> list[str]:
    """Return the words of a quiet online run on the CPU, with settings."""
    sampled = {
        "mode": "online",
        "data": fixtures.prompts,
        "rewards": f"[{fixtures.rewards}:length]",
        "samples_per_prompt": 2,
        "max_new_tokens": 6,
        "max_steps": 8,
    }
    return train_words(fixtures, **{**sampled, **settings})


def as_words(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return words


# ---- runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The end of a command: exit status (negative: the signal), output, seconds."""

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool = False

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.out + self.err

    @property
    def has_traceback_of_ours(self) -> bool:
        """Return whether a traceback leads through una_fast: torchrun prints its own for faults."""
        return self.has_traceback and re.search(r'File ".*/una_fast/', self.out + self.err)

    @property
    def last(self) -> str:
        """Return the last line of stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def kind(self) -> str:
        """Return the kind of the end.

        ok | refusal (exit 1 and a line with "error:") | usage (exit 2, the same) | stopped (exit
        128 + signal, after saving) | signal | traceback | hang | exit N
        """
        if self.timed_out:
            return "hang"
        if self.has_traceback:
            return "traceback"
        if self.code == 0:
            return "ok"
        if self.code < 0:
            return "signal"
        if self.code in (1, 2) and "error: " in self.err:
            return "refusal" if self.code == 1 else "usage"
        return "stopped" if self.code > 128 else f"exit {self.code}"

    @property
    def is_clear(self) -> bool:
        """Return whether the command ended well, or with one line that says why not."""
        return self.kind in ("ok", "refusal", "usage")


def preload() -> None:
    """Import and build what every run needs, so that forked children need not; no tensor work."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401

    import una_fast.cli
    import una_fast.train.loop
    import una_fast.train.precompute

    torch.set_num_threads(1)
    una_fast.cli._parser(["train"])
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def una_fast(words: Sequence[object], **options: Any) -> Result:
    """Run a command of una-fast in a forked child; options as in `forked`."""

    def command() -> int:
        from una_fast.cli import main

        return main([str(word) for word in words])

    return forked(command, **options)


def forked(
    function: Callable[[], int | None],
    *,
    timeout: float = 120.0,
    cwd: Path | None = None,
    during: Callable[[int], None] | None = None,
    logs: Path | None = None,
) -> Result:
    """Run a function in a forked child with files of its own for stdout and stderr.

    function: returns the exit status
    timeout: seconds until the child is killed
    cwd: working directory of the child
    during: called in the parent with the child's process id
    logs: folder for the output; default: a temporary one
    """
    with tempfile.TemporaryDirectory(dir=logs) as folder:
        paths = [Path(folder) / name for name in ("out", "err")]
        start = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(function, paths, cwd, timeout)
        if during is not None:
            during(pid)
        status, timed_out = _wait(pid, start + timeout)
        code = os.waitstatus_to_exitcode(status)
        # A child may die before its first line.
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in paths]
    if timed_out:
        print(f"# a hang of {timeout:.0f} s:\n{texts[1][-3000:]}", flush=True)
    return Result(code, *texts, time.monotonic() - start, timed_out)


def _child(
    function: Callable[[], int | None], paths: Sequence[Path], cwd: Path | None, timeout: float
) -> None:
    """Run the function of a child, and end the process; shortly before its time, say where it is.

    As `forked`.
    """
    code = 70
    try:
        os.setpgid(0, 0)
        for number, path in enumerate(paths, start=1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        faulthandler.dump_traceback_later(max(timeout - 3, 1))
        if cwd is not None:
            os.chdir(cwd)
        code = status_of(function)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def status_of(function: Callable[[], int | None]) -> int:
    """Call a function; return its exit status, 71 after an exception that it let out."""
    try:
        return int(function() or 0)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return int(error.code or 0)
    except BaseException as error:
        if isinstance(error, TimeUp):
            raise
        traceback.print_exc()
        return 71


def _wait(pid: int, deadline: float) -> tuple[int, bool]:
    """Wait for a child; return (status, killed at the deadline)."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1], True


class TimeUp(BaseException):
    """The time of a call in this process is over."""


def in_process(function: Callable[[], int | None], *, timeout: float = 20.0) -> Result:
    """Run a function in this process: as `forked`, a hundred times as fast, without the shelter."""

    def ring(*_: object) -> None:
        raise TimeUp

    streams = []
    for _ in range(2):
        raw = io.BytesIO()
        streams.append(
            io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", write_through=True)
        )
    start, here = time.monotonic(), os.getcwd()
    code, timed_out = 70, False
    before = signal.signal(signal.SIGALRM, ring)
    handlers = list(logging.getLogger().handlers)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = status_of(function)
    except TimeUp:
        timed_out = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)
        logging.getLogger().handlers[:] = handlers
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams]
    return Result(code, *texts, time.monotonic() - start, timed_out)


# ---- commands, and ranks -----------------------------------------------------------------------


MARK = "UNA_TRIAL_COMMAND"


class Command:
    """una-fast as a command of its own, with one rank or several.

    Its processes are known by a variable of their environment: torchrun gives every rank a session
    of its own, and ranks outlive their launcher.
    """

    def __init__(
        self,
        words: Sequence[object],
        log: Path,
        *,
        ranks: int = 1,
        cwd: Path | None = None,
    ) -> None:
        """Start the command.

        words: of the command line
        log: file that its output is added to
        ranks: more than one are started by torchrun
        cwd: working directory
        """
        head: list[object] = [SCRIPTS / "una-fast"]
        if ranks > 1:
            head = [SCRIPTS / "torchrun", f"--nproc-per-node={ranks}"]
            head += [f"--master-port={free_port()}", "--no-python", SCRIPTS / "una-fast"]
        self.log = log
        self.mark = f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        self.start = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(word) for word in (*head, *words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={**os.environ, name: value},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def members(self) -> list[int]:
        """Return the processes of the command: the launcher, if it runs, and the ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in read_environment(entry):
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """Kill the launcher and all ranks at once."""
        while members := self.members():
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()

    def wait(self, timeout: float = 120.0) -> Result:
        """Wait for the end; kill the command at the timeout."""
        timed_out = False
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            self.kill()
            self.process.wait()
        text = self.log.read_text(errors="replace")
        seconds = time.monotonic() - self.start
        return Result(self.process.returncode, "", text, seconds, timed_out)

    def when(self, condition: Callable[[], bool], timeout: float = 120.0) -> bool:
        """Wait until a condition holds, or the command ends; return whether the condition holds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.is_running:
                return False
            time.sleep(0.005)
        return False


def read_environment(process: Path) -> list[bytes]:
    """Return the environment of a process in /proc; a zombie has none."""
    return (process / "environ").read_bytes().split(b"\0")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- what a run leaves -------------------------------------------------------------------------


def weights_digest(directory: Path) -> str:
    """Return a hash of the saved weights in a directory; "" without any."""
    digest = hashlib.sha256()
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if files else ""


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without their timing; no lines without the file."""
    path = directory / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if name not in TIMING})
    return rows


def lines_in(path: Path) -> int:
    """Return how many lines a file has; 0 if it is absent."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def whole_checkpoints(directory: Path) -> list[int]:
    """Return the steps of the checkpoints whose files are all as they were written."""
    from una_fast.train.checkpoint import all_checkpoints
    from una_fast.train.manifest import DamagedError, Manifest

    steps = []
    for path in all_checkpoints(directory):
        with contextlib.suppress(DamagedError):
            manifest = Manifest.read(path)
            manifest.verify(path)
            steps.append(manifest.step)
    return steps


def differences(directory: Path, truth: Path) -> str:
    """Return what a finished run has different from another: "", "weights", "metrics" or both."""
    found = []
    if weights_digest(directory) != weights_digest(truth):
        found.append("weights")
    if metrics_of(directory) != metrics_of(truth):
        found.append("metrics")
    return " and ".join(found)
