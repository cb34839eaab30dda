#!/usr/bin/env python3
"""Mutate records, and damage Parquet files, and look at what the reader of a run makes of them.

    .venv/bin/python tests/trials/records.py [--seed N] [--short]

`una-fast train` runs up to the data, without a model. A record may be accepted if an independent
oracle (strict JSON, the table of README) allows it; otherwise the run must end with one line that
names file and line, or leave the record out with on_bad_record: skip. A damaged Parquet file is
read as it was, or refused by name.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
from common import Trial, in_process, main

from una_fast import cli
from una_fast.data.sources import Source, read_rows
from una_fast.model.loading import load_tokenizer
from una_fast.model.reference import has_cached_logps
from una_fast.train.loop import TrainResult
from una_fast.train.run_data import load_data

MUTATIONS = 1600
DAMAGES = 400
SHORT = 100
LIMIT = 20  # seconds
LONGEST = 1700  # characters of a message

USER = {"role": "user", "content": "why"}
BASES: dict[str, dict[str, Any]] = {
    "pair": {
        "prompt": "the cat",
        "chosen": "sat on a mat",
        "rejected": "rain fell",
        "margin": 0.1,
        "weight": 2.0,
    },
    "label": {"prompt": "the cat", "completion": "sat", "label": True},
    "score": {"prompt": "the cat", "completion": "sat", "score": 0.5},
    "instruction": {"prompt": "the cat", "completion": "sat on"},
    "several": {
        "prompt": "the cat",
        "completions": ["sat", "on a mat", "rain"],
        "scores": [0.1, 0.5, 1.0],
    },
    "rated": {
        "prompt": "the cat",
        "chosen": "sat",
        "rejected": "fell",
        "chosen_rating": 0.9,
        "rejected_rating": 0.2,
    },
    "chat": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "rain"}],
        "rejected": [{"role": "assistant", "content": "stop"}],
    },
    "cached": {"prompt": "the cat", "chosen": "sat", "rejected": "fell", "ref_logps": [-3.5, -4.2]},
}
GOOD = json.dumps({"prompt": "a", "chosen": "cat", "rejected": "mat"})


def deep(levels: int, start: str = "[", end: str = "]", inside: str = "") -> str:
    """Return the JSON text of nested lists or objects."""
    return start * levels + inside + end * levels


# JSON texts that stand in the place of a value.
VALUES = (
    r"""
null|true|false|0|1|-1|2|0.5|NaN|Infinity|-Infinity|1e309|-1e309|1e308|1e-320|-0.0|-1e300
""|"   "|"\n"|"a\u0000b"|"\u0000"|"a\u2028b"|"\ud800"|"x\udfff y"|"\ud83d\ude00"|"\u202esat"
"\u200b"|"\u00a0"|"\ufeffsat"|"</s>"|"</s></s>"|"<s>"|"<pad>"|"sat</s>"|"0.5"|"true"|"NaN"|"\u001b[2J"
[]|[0]|[null]|[""]|["sat"]|["sat","on"]|[["sat"]]|[-1,-2]|[1,-2]|[-1e300,-1]|[NaN,-1]|{}|{"a":NaN}
{"a":1,"a":2}|{"\ud800":1}|{"role":"user","content":"x"}|[{"role":"user","content":"x"}]
[{"role":"assistant","content":"x"}]|[{"role":1,"content":"x"}]|[{"role":"","content":"x"}]
[{"role":"wizard","content":"x"}]|[{"role":"assistant","content":null}]|[{"content":"x"}]
[{"role":"assistant","content":[{"type":"text","text":"x"}]}]|[{"role":"assistant","content":""}]
[{"role":"user","content":"why"},{"role":"assistant","content":"x"}]|[{"role":"system","content":"x"}]
[{"role":"assistant","tool_calls":[1]}]|[{"role":"assistant","content":null,"tool_calls":"x"}]
[{"role":"assistant","content":"x","tool_calls":{"a":1}}]|[{"role":"user","content":"","tool_calls":[{}]}]
[{"role":"assistant","content":"\ud800"}]|[{"role":"\ud800","content":"x"}]
[{"role":"assistant","content":"x","extra":"\udc00"}]
""".strip("\n")
    .replace("\n", "|")
    .split("|")
)
VALUES += ["9" * 30, "9" * 310, "9" * 5000, "0." + "9" * 5000, '"raw \u2028 line"', '"\U0001f600"']
VALUES += [deep(100), deep(101), deep(5000), deep(200_000), deep(3000, '{"a":', "}", "1")]
VALUES += [
    '"' + "cat " * 250_000 + '"',
    "[" + '"sat",' * 4000 + '"on"]',
    "[" + "0.5," * 4000 + "1]",
]
NAMES = ["x", "", "completion", "completions", "score", "scores", "label", "chosen", "ref_logps"]
NAMES += ["margin", "weight", "__class__", "\u2028", "\u202e", "a\nb", "\x1b[31m", "c" * 5000]
NOISE = [0, 0xFF, 0xFE, 0x80, 0xC0, 0x22, 0x5C, 0x7B, 0x2C, 0x09, 0x0D]


# ---- the oracle ----------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """Return the value of strict JSON in UTF-8 without keys given twice; ValueError otherwise."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key twice")
        return dict(items)

    def constant(name: str) -> None:
        raise ValueError(name)

    value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half surrogate pairs
    return value


def is_number(value: object) -> bool:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and abs(value) <= sys.float_info.max


def is_unit(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_text(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return is_message(value)
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if isinstance(content, list) and all(map(is_part, content)):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    return isinstance(content, str) and bool(content.strip())


def is_part(value: object) -> bool:
    if isinstance(value, str):
        return True
    is_text_part = isinstance(value, dict) and value.get("type", "text") == "text"
    return is_text_part and isinstance(value.get("text"), str)


def fault_of(line: bytes) -> str | None:
    """Return why a record may not be accepted; None if it may."""
    try:
        row = strict(line.decode("utf-8-sig"))
    except RecursionError:
        return "too deep"
    except ValueError as error:
        return f"not strict JSON: {error}"[:60]
    if not isinstance(row, dict):
        return "not an object"
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("prompt", "chosen", "rejected", "completion"):
        if name in row and not is_text(row[name]):
            return f"{name} is no text"
    if "completions" in row:
        for name, good in (("completions", is_text), ("scores", is_unit)):
            value = row.get(name)
            if not (isinstance(value, list) and value and all(map(good, value))):
                return name
    numbers = ["score"] * ("completion" in row)
    numbers += ["chosen_rating", "rejected_rating"] * ("chosen" in row)
    for name in numbers:
        if name in row and not is_unit(row[name]):
            return f"{name} outside [0, 1]"
    numbers = ["weight"] + ["margin"] * ("chosen" in row and "chosen_rating" not in row)
    for name in numbers:
        if name in row and not is_number(row[name]):
            return f"{name} is no number"
    if row.get("weight", 0) < 0:
        return "negative weight"
    if "completion" in row and not isinstance(row.get("label", True), bool):
        return "label"
    if "ref_logps" in row:
        sums = row["ref_logps"]
        sums = sums if isinstance(sums, list) else [sums]
        if not all(is_number(x) and -1e9 < x <= 0 for x in sums):
            return "ref_logps"
    if "prompt" not in row and not isinstance(row.get("chosen", row.get("completion")), list):
        return "no prompt"
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        return "equal"
    return None


# ---- mutations -----------------------------------------------------------------------------------


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """Return a name and a line."""
    base = rng.choice(sorted(BASES))
    row = copy.deepcopy(BASES[base])
    ways = [_values] * 7 + [_inner, _dropped, _twice, _extra, _bytes, _cut, _swapped, _format]
    way = rng.choice(ways)
    line = way(rng, row)
    return f"{base}{way.__name__}", line.replace(b"\n", b" ")


def _encoded(row: dict[str, str]) -> bytes:
    """Return an object of given JSON texts."""
    body = ",".join(f"{json.dumps(name)}:{text}" for name, text in row.items())
    return ("{" + body + "}").encode("utf-8", "surrogatepass")


def _texts(row: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in row.items()}


def _values(rng: random.Random, row: dict[str, Any]) -> bytes:
    names = rng.sample(sorted(row), min(len(row), rng.choice([1, 1, 1, 2])))
    return _encoded(_texts(row) | {name: rng.choice(VALUES) for name in names})


def _inner(rng: random.Random, row: dict[str, Any]) -> bytes:
    lists = [name for name, value in row.items() if isinstance(value, list)]
    if not lists:
        return _values(rng, row)
    name = rng.choice(lists)
    entries = [json.dumps(entry) for entry in row[name]]
    entries[rng.randrange(len(entries))] = rng.choice(VALUES)
    return _encoded(_texts(row) | {name: f"[{','.join(entries)}]"})


def _dropped(rng: random.Random, row: dict[str, Any]) -> bytes:
    del row[rng.choice(sorted(row))]
    return _encoded(_texts(row))


def _twice(rng: random.Random, row: dict[str, Any]) -> bytes:
    again = json.dumps(rng.choice(sorted(row)))
    return _encoded(_texts(row))[:-1] + f",{again}:{rng.choice(VALUES[:12])}}}".encode()


def _extra(rng: random.Random, row: dict[str, Any]) -> bytes:
    names = [name for name in NAMES if name not in row]
    return _encoded(_texts(row) | {rng.choice(names): rng.choice(VALUES)})


def _bytes(rng: random.Random, row: dict[str, Any]) -> bytes:
    line = bytearray(_encoded(_texts(row)))
    for _ in range(rng.randint(1, 3)):
        line[rng.randrange(len(line))] = rng.choice([*NOISE, rng.randrange(256)])
    return bytes(line)


def _cut(rng: random.Random, row: dict[str, Any]) -> bytes:
    line = _encoded(_texts(row))
    return line[: rng.randrange(1, len(line))]


def _swapped(rng: random.Random, row: dict[str, Any]) -> bytes:
    one, other = rng.sample(sorted(row), 2)
    row[one], row[other] = row[other], row[one]
    return _encoded(_texts(row))


def _format(rng: random.Random, row: dict[str, Any]) -> bytes:
    line = _encoded(_texts(row))
    bom = b"\xef\xbb\xbf"
    forms = [bom + line, bom * 2 + line, line + b"\r", line + b"\r" + line, line + line]
    forms += [json.dumps(row).encode("utf-16"), b"[" + line + b"]", b'"x"', b"1", line + b" // x"]
    forms += [line[:-1] + b",}", line.replace(b'"', b"'"), b"   ", b" " + line + b" ", b"\x00"]
    forms += [b"\x0b" + line, b"\x0c", line[:-1] + b',"x":"' + b"y" * 10_000_000 + b'"}']
    forms += [_encoded({f"column {k}": "1" for k in range(4000)} | _texts(row))]
    forms += [_encoded({f"\x1b[3{k}m": "1" for k in range(400)})]
    return rng.choice(forms)


# ---- the reader ----------------------------------------------------------------------------------


class Reader:
    """`una-fast train` up to the data of the run."""

    def __init__(self, trial: Trial) -> None:
        self.model = str(trial.fixtures.model)
        self.tokenizer = load_tokenizer(self.model)
        self.output = str(trial.root / "out")
        self.words = ["train", "--model", self.model, "--output_dir", self.output, "--data"]

    def read(self, path: Path, *, skip: bool = False) -> Any:
        """Return the result of the command; it prints its examples and the skipped records."""
        more = ["--on_bad_record", "skip"] * skip
        with mock.patch("una_fast.train.loop.train", self._train):
            return in_process(lambda: cli.main([*self.words, str(path), *more]), timeout=LIMIT)

    def _train(self, config: Any) -> TrainResult:
        data = load_data(config, self.tokenizer)
        examples = data.examples()
        has_cached_logps(examples)
        numbers = [float(e.feedback.weight.sum() + e.feedback.margin.sum()) for e in examples]
        assert all(map(math.isfinite, numbers))
        print(json.dumps({"examples": len(examples), "skipped": data.reports[0].skipped}))
        return TrainResult(Path(config.output_dir), 0, {})


def verdict_of(result: Any, names: tuple[str, ...], fault: str | None) -> tuple[str, str]:
    """Return (verdict, detail) of a run; "accepted" and "refused" are good.

    names: the message must hold one of them
    fault: why the data may not be accepted
    """
    err = result.err.strip()
    if result.timed_out:
        return "hang", f"{result.seconds:.0f} s"
    if result.has_traceback:
        return "traceback", result.last[:300]
    if result.code == 0:
        return ("accepted nonsense", fault) if fault else ("accepted", "")
    if result.code != 1 or ": error: " not in err:
        return f"status {result.code}", err[-300:]
    message = err[err.index(": error: ") :]
    if "\n" in message or len(message) > LONGEST or not message.isprintable():
        return "not one printable line", ascii(message)[:300]
    if not any(name in message for name in names):
        return "names nothing", message[:300]
    return "refused", ""


def _try_records(trial: Trial, reader: Reader, counts: Counter[str]) -> None:
    rng = trial.rng("records")
    path = trial.new_folder("records") / "r.jsonl"
    for number in range(SHORT if trial.short else MUTATIONS):
        name, line = mutated(rng)
        path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
        fault = fault_of(line) if line.strip() else None
        names = ("r.jsonl:2", "r.jsonl:1: has no ref_logps", "r.jsonl:1 has no ref_logps")
        verdict, detail = verdict_of(reader.read(path), names, fault)
        _count(trial, counts, verdict, f"{name} {line[:150]!r}", detail)
        if verdict != "refused" or number % 2:
            continue
        skipped = reader.read(path, skip=True)
        good = skipped.code == 0 and '"skipped": 1' in skipped.out
        good = good or "has no ref_logps while" in skipped.err
        verdict = "refused" if good else "skip does not skip"
        _count(trial, counts, verdict, f"{name} {line[:150]!r}", skipped.last[:300])


def _try_parquet(trial: Trial, reader: Reader, counts: Counter[str]) -> None:
    folder = trial.new_folder("parquet")
    rows = [{**BASES["pair"], "prompt": f"the cat {k}"} for k in range(200)]
    good, path = folder / "good.parquet", folder / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), good, row_group_size=50)
    content = good.read_bytes()
    rng = trial.rng("parquet")
    for _ in range(SHORT if trial.short else DAMAGES):
        damaged = bytearray(content)
        how = rng.choice(["flip", "zero", "cut", "middle"])
        start = rng.randrange(len(damaged))
        if how == "flip":
            damaged[start] ^= 1 << rng.randrange(8)
        elif how == "zero":
            size = min(rng.randint(1, 400), len(damaged) - start)
            damaged[start : start + size] = bytes(size)
        elif how == "cut":
            del damaged[start:]
        else:
            del damaged[start : start + rng.randint(1, 400)]
        path.write_bytes(damaged)
        verdict, detail = verdict_of(reader.read(path), ("d.parquet",), None)
        _count(trial, counts, verdict, f"{how} at {start} of {len(content)}", detail)
    assert len(list(read_rows(Source(str(good))))) == len(rows)


def _count(trial: Trial, counts: Counter[str], verdict: str, name: str, detail: str) -> None:
    counts[verdict] += 1
    if verdict in ("accepted", "refused"):
        trial.total += 1
    else:
        trial.report(f"{verdict}: {ascii(detail)}", False, ascii(name)[:300])


def run(trial: Trial) -> None:
    """Try mutations drawn by the seed, and count them."""
    reader = Reader(trial)
    for name, attempt in (("records", _try_records), ("parquet", _try_parquet)):
        counts: Counter[str] = Counter()
        attempt(trial, reader, counts)
        trial.figures[name] = dict(counts)
        print(f"# {name}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
