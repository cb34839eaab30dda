"""Compute reference log-probs once for a whole data set, as a column of its records.

    data-00-pairs.jsonl.logps.tmp   log-probs computed so far, a line per micro-batch
    data-00-pairs.jsonl             the records with the column, when all are computed
    data-00-pairs.jsonl.ref.json    its sidecar (ref_cache.py)

A killed command leaves the first file, and the same command goes on from there: its files are
bitwise those of a command that was never killed.

Several ranks share the micro-batches of one process, in turn; weights are sharded. Batches, dtypes
and so the numbers do not depend on the ranks, and the main rank writes. Ranks that split rows
(parallel.context) round otherwise, in the last bits.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.loader import Loader
from una_fast.data.records import as_object
from una_fast.data.sources import Source, read_rows
from una_fast.data.template_date import fix_template_date
from una_fast.distributed import World, start_ranks
from una_fast.files import ASIDE, written_whole
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.printable import printable
from una_fast.resolved import (
    ResolvedRun,
    find_facts,
    load_frozen,
    refuse_quantized_shards,
    refuse_sharded_codes,
    resolve,
    scoring_of,
)
from una_fast.signals import Stopped
from una_fast.train.build import place
from una_fast.train.data_checks import check_data
from una_fast.train.ref_cache import RefCache, model_identity, token_identity, tokens_of
from una_fast.train.run_dir import locked

PROGRESS = f".logps{ASIDE}"  # after the name of the data file


def precompute_reference(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Write the usable records of a run again, with a column of reference log-probs.

    config: settings of the run; the same model, tokenizer, precision and record settings must be
        used for training

    Files are output_dir/data-NN-<source>.jsonl for every source of the data, and
    eval_data-NN-<source>.jsonl likewise, with a sidecar each. A value of the column is a sum over
    tokens per response, chosen first. Returns the `data:` and `eval_data:` entries that train on
    the new files.

    ValueError for runs that sample, and for data or a model that cannot be scored.
    """
    if config.mode != "offline":
        raise ValueError(
            f"mode={config.mode}: only records have reference log-probs to compute; "
            "set mode: offline"
        )
    output_dir = Path(config.output_dir).absolute()
    sources = [(f"data-{k:02d}", "data", entry) for k, entry in enumerate(config.data)]
    for k, entry in enumerate(config.eval_data):
        sources.append((f"eval_data-{k:02d}", "eval_data", entry))
    world = start_ranks(config.device, config.parallel)
    with locked(output_dir) if world.is_main else contextlib.nullcontext():
        world.barrier()
        try:
            writer = _open_writer(config, output_dir, world)
            written: dict[str, list[dict[str, Any]]] = {}
            for prefix, name, entry in sources:
                written.setdefault(name, []).append(writer.rewrite(entry, prefix))
        except Stopped as error:
            raise _with_advice(error) from None
        world.on_main(lambda: _remove_progress(output_dir))
    return written


def _with_advice(error: Stopped) -> Stopped:
    message = f"ended by {error.name}; the same command goes on from the log-probs computed so far"
    return Stopped(error.number, message, by_signal=error.by_signal)


def _open_writer(config: RunConfig, output_dir: Path, world: World) -> _Writer:
    """Load the reference as a training run of one process does; several ranks shard its weights."""
    refuse_sharded_codes(config, world.size)
    facts = find_facts(config, [], device=world.device.type)
    run = resolve(replace(config, parallel=None), facts)
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    date = world.on_main(lambda: _date_of(output_dir))
    fix_template_date(tokenizer, date)
    # The vectors of an imitated autocast are widened after they are read.
    in_shards = world.sharded and not run.imitates_autocast
    reference = load_frozen(config, run, in_shards=in_shards)
    if world.sharded:
        refuse_quantized_shards(reference, config)
    parallel = config.parallel
    if parallel is not None and parallel.split_vocabulary:
        # Over slices of the vocabulary the last bits would depend on the number of ranks.
        parallel = replace(parallel, split_vocabulary=False)
        if world.is_main:
            print("split_vocabulary is for training: the head is gathered here", flush=True)
    place(reference, world, None, parallel)
    made_with = model_identity(reference, run, new_adapter=False)
    scoring = scoring_of(config, run, world.context)
    return _Writer(config, run, output_dir, tokenizer, reference, scoring, made_with, world, date)


def _remove_progress(output_dir: Path) -> None:
    for path in _progress_files(output_dir):
        path.unlink()


def _progress_files(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob(f"*data-[0-9]*.jsonl{PROGRESS}"))


def _date_of(output_dir: Path) -> str:
    """Return the date that chat templates print: of the command that is gone on from, or today."""
    for path in _progress_files(output_dir):
        for header, _ in _sealed_lines(path):
            return header["date"]
    return datetime.date.today().isoformat()


@dataclass(frozen=True)
class _Writer:
    """Writes sources again with the log-probs of a frozen model.

    run: decisions of the run
    output_dir: of the new files
    reference: the frozen model, on the device
    made_with: identity of the model
    world: the ranks; all of them must call
    date: printed by chat templates
    """

    config: RunConfig
    run: ResolvedRun
    output_dir: Path
    tokenizer: PreTrainedTokenizerBase
    reference: Policy
    scoring: Scoring
    made_with: dict[str, Any]
    world: World
    date: str

    def rewrite(self, entry: str | dict[str, Any], prefix: str) -> dict[str, Any]:
        """Write the new file of a source, and return the entry that trains on the file.

        entry: of the setting data or eval_data
        prefix: first part of the file's name
        """
        source = Source.parse(entry, self.config.record_options())
        identity = token_identity(self.tokenizer, source.options) | self.made_with
        unit_scores = self.config.objective().scores_in_unit_interval
        examples, report = load_examples(
            _without_old_logps(source), self.tokenizer, require_unit_scores=unit_scores
        )
        if self.world.is_main:
            print(report, flush=True)
        check_data(examples, [], self.reference, self.tokenizer)
        target = self.output_dir / f"{prefix}-{Path(source.path).stem}.jsonl"
        tokens = tokens_of(examples)
        header = {"tokens": tokens, "date": self.date, "identity": identity, "ways": self._ways()}
        with _telling_of_space(target):
            logps = self._logps(examples, target, header)
            cache = RefCache(target, tokens, self.date, identity)
            self.world.on_main(lambda: _write_with(source, logps, cache))
        settings = dict(entry) if isinstance(entry, dict) else {}
        settings.pop("split", None)
        return {**settings, "path": str(Path(self.config.output_dir) / target.name)}

    def _ways(self) -> dict[str, Any]:
        """Return what decides on the last bits of a log-prob: batches, kernels, versions."""
        names = ("batch_size", "micro_batch_size", "max_tokens_per_batch", "attn_implementation")
        return {
            **{name: getattr(self.config, name) for name in names},
            **self.run.plain(),
            "context": self.world.context.size,
            "torch": torch.__version__,
        }

    def _logps(
        self, examples: Sequence[Example], target: Path, header: dict[str, Any]
    ) -> dict[str, list[float]]:
        """Return origin -> log-probs of the responses, of every example.

        examples: of a source
        target: the new file of the source
        header: what the log-probs depend on
        """
        loader = Loader(
            [examples],
            [1.0],
            batch_size=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            max_tokens_per_batch=self.config.max_tokens_per_batch,
            packed=self.reference.packed,
            rope_limits=self.run.rope_limits,
            seed=self.config.seed,
        )
        micro_batches: list[list[Example]] = []
        for step in loader.in_order():
            micro_batches += step.micro_batches
        path = target.with_name(target.name + PROGRESS)
        with _Progress(path, header, self.world) as progress:
            found = progress.done[: len(micro_batches)]
            for start in range(len(found), len(micro_batches), self.world.data_size):
                computed = self._round(micro_batches[start : start + self.world.data_size])
                progress.add(*computed)
                found += computed
        logps = {}
        for micro_batch, values in zip(micro_batches, found, strict=True):
            for example, own in zip(micro_batch, values, strict=True):
                logps[example.origin] = own
        return logps

    def _round(self, micro_batches: Sequence[Sequence[Example]]) -> list[list[list[float]]]:
        """Return the log-probs of a micro-batch per context group, or of fewer; on all ranks."""
        number = self.world.data_rank
        mine = micro_batches[number] if number < len(micro_batches) else []
        values, fault = [], None
        try:
            values = self._logps_of(mine)
        except ValueError as error:  # the other ranks wait, and must hear of it
            fault = error
        shares = self.world.gather((values, fault))
        for _, fault in shares:
            if fault is not None:
                raise fault
        first_of_groups = shares[:: self.world.context.size]
        return [values for values, _ in first_of_groups[: len(micro_batches)]]

    def _logps_of(self, micro_batch: Sequence[Example]) -> list[list[float]]:
        """Return the log-probs of the responses of every example."""
        batch = collate(
            micro_batch,
            packed=self.reference.packed,
            device=self.world.device,
            pad_id=self.tokenizer.pad_token_id,
        )
        # A sum of logs of probabilities near 1 may round to a number above 0.
        values = iter(self.scoring.logps(self.reference, batch).clamp_max(0.0).tolist())
        found = []
        for example in micro_batch:
            own = [next(values) for _ in example.responses]
            if not all(map(math.isfinite, own)):
                raise ValueError(
                    f"{example.origin}: the model gives log-probs {own}; look for weights that are "
                    "not finite, or set precision: fp32"
                )
            found.append(own)
        return found


# ---- progress ----------------------------------------------------------------------------------


class _Progress:
    """The log-probs computed so far, in a file: a header, and then a line per micro-batch.

    Every line carries its hash: a line that was cut by a kill, or damaged, is computed again, and
    all that follow. The main rank has the file; all ranks know what is in it.
    """

    def __init__(self, path: Path, header: dict[str, Any], world: World) -> None:
        """Read the lines that an earlier command has left, if their header is the same.

        path: the file
        header: what the log-probs depend on, as JSON values
        world: the ranks; all of them must call
        """
        self.world = world
        self._file: TextIO | None = None
        self.done = world.on_main(lambda: self._open(path, header))

    def _open(self, path: Path, header: dict[str, Any]) -> list[list[list[float]]]:
        """Open the file; return the log-probs that it holds, by micro-batch."""
        done: list[list[list[float]]] = []
        lines = [] if not path.exists() else [*_sealed_lines(path)]
        if lines and lines[0][0] == json.loads(json.dumps(header)):
            done = [value for value, _ in lines[1:]]
            os.truncate(path, lines[-1][1])
            self._file = path.open("a", encoding="utf-8")
            print(f"{path.name}: {len(done)} micro-batches are computed already", flush=True)
        else:
            if path.exists():
                print(f"{path.name} is damaged or of other settings: starting anew", flush=True)
            self._file = path.open("w", encoding="utf-8")
            self._write([header])
        return done

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *values: list[list[float]]) -> None:
        """Write the log-probs of some micro-batches."""
        self.world.on_main(lambda: self._write(values))

    def _write(self, values: Iterable[Any]) -> None:
        """Write lines: the header, or the log-probs of micro-batches."""
        for value in values:
            text = json.dumps(value)
            self._file.write(f"{_seal(text)} {text}\n")
        self._file.flush()


def _sealed_lines(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield (value, where the line ends) for the lines of a file, up to the first broken one."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            seal, _, text = line.decode("utf-8", "replace").partition(" ")
            if not text.endswith("\n") or _seal(text[:-1]) != seal:
                return
            end += len(line)
            yield json.loads(text), end


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _telling_of_space(target: Path) -> Iterator[None]:
    """Say what a failure to write means, and how much space is free; ValueError."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise ValueError(
            f"{target} was not written: {printable(error)}; {free / 1e6:.3g} MB are free. Make "
            "room, and start the same command again: it goes on from the log-probs computed so far"
        ) from error


def _without_old_logps(source: Source) -> Source:
    """Return a source whose log-probs are not read: new ones replace them, whatever they are."""
    options = source.options.resolved()
    columns = {**options.columns, "ref_logps": "(replaced)"}
    return replace(source, options=replace(options, columns=columns))


# ---- the new file ------------------------------------------------------------------------------


def _write_with(source: Source, logps: dict[str, list[float]], cache: RefCache) -> None:
    """Write the rows of a source that have log-probs, with the log-probs as a column; the sidecar.

    source: the rows; its settings name the column
    logps: origin of a row -> log-probs of its responses
    cache: the sidecar, but for what depends on the written bytes
    """
    column = source.options.resolved().columns.get("ref_logps", "ref_logps")
    digest = hashlib.sha256()
    records = size = 0
    with written_whole(cache.file) as file:
        for origin, row in read_rows(source):
            if origin not in logps:
                continue
            line = _as_line({**as_object(row), column: logps[origin]})
            file.write(line)
            digest.update(line.encode())
            size += len(line.encode())
            records += 1
        if records != len(logps):
            raise ValueError(
                f"{source.path} has changed while its log-probs were computed; start again"
            )
        # Before the file has its name: no file of ours is ever without its sidecar, and an older
        # file beside a new sidecar is refused until the new file is there.
        replace(cache, records=records, bytes=size, sha256=digest.hexdigest()).write()


def _as_line(record: dict[str, Any]) -> str:
    """Return a record as a line of strict JSON; what JSON lacks is null (nan) or text (dates)."""
    try:
        text = json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(record), ensure_ascii=False, default=str)
    return text + "\n"


def _without_nan(value: Any) -> Any:
    """Return a value with null in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return value
