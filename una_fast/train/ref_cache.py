"""Cached reference log-probs: a sidecar says whose they are, and a run compares them with itself.

data-00-pairs.jsonl            records with a column ref_logps, by `una-fast precompute-ref`
data-00-pairs.jsonl.ref.json   the sidecar: size, SHA-256 and records of the file, and the
                               fingerprints of weights, tokenizer, chat template, precision and
                               record settings that the log-probs belong to

Log-probs of another model are plausible numbers that train on a wrong objective. So a file with a
sidecar is used with the same model and tokens alone; of a file without, a few log-probs are
computed again with the policy, which is the reference at the start of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source
from una_fast.distributed import World
from una_fast.files import sha256_of, write_json
from una_fast.model.policy import Policy
from una_fast.model.quantized import is_plain
from una_fast.model.reference import fingerprint, saved_tensors
from una_fast.model.scoring import Scoring
from una_fast.printable import printable, shown
from una_fast.resolved import ResolvedRun

SUFFIX = ".ref.json"
MEND = "write them again with una-fast precompute-ref, or set reference=frozen (or adapter)"

# Record settings that decide on token ids; the others decide on feedback.
TEXTS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "conversations",
    "messages",
    "system",
    "tools",
    "chat_template_kwargs",
)
LIMITS = ("max_prompt_tokens", "max_tokens", "prompt_overflow")
CHATS = ("strings", "chat_template_kwargs")

COMPARED = 4  # records of a file without a sidecar, spread over the file
NATS_PER_TOKEN = 0.1  # of rounding: other batches, kernels and dtypes, never another model
RELATIVE = 0.02


@dataclass(frozen=True)
class RefCache:
    """The sidecar of a data file.

    file: the data file; not saved, since files move
    tokens: hash of all token ids that the log-probs were computed on
    date: ISO date that chat templates printed
    identity: name -> what the log-probs belong to, see token_identity and model_identity
    records, bytes, sha256: of the data file
    """

    file: Path
    tokens: str
    date: str
    identity: dict[str, Any]
    records: int = 0
    bytes: int = 0
    sha256: str = ""

    def write(self) -> None:
        """Write the sidecar, whole or not at all."""
        content = asdict(self)
        del content["file"]
        write_json(sidecar_of(self.file), content)

    @staticmethod
    def read(file: Path) -> RefCache | None:
        """Return the sidecar of a data file, None without one; ValueError for a damaged one."""
        path = sidecar_of(file)
        try:
            content = json.loads(path.read_bytes())
            cache = RefCache(file, **content)
            if not isinstance(cache.identity, dict) or not isinstance(cache.date, str):
                raise TypeError
            return cache
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no sidecar of ref_logps ({type(error).__name__}); {MEND}"
            ) from None

    def check_file(self) -> None:
        """Raise ValueError if the data file is not the one that was written."""
        if self.file.stat().st_size == self.bytes and sha256_of(self.file) == self.sha256:
            return
        with self.file.open("rb") as lines:
            records = sum(1 for line in lines if line.strip())
        counts = f"{records} records now, {shown(self.records)} then"
        raise ValueError(
            f"{self.file} has changed since its ref_logps were computed ({counts}): restore it, "
            f"or {MEND}"
        )

    def refuse_others(self, current: dict[str, Any]) -> None:
        """Raise ValueError, by name, if log-probs belong to anything else than a run has.

        current: name -> value, all or a part of the identity
        """
        changed = []
        for name, value in current.items():
            before = self.identity.get(name)
            if before != value:
                is_hash = name in ("weights", "tokenizer", "chat_template")
                values = "" if is_hash else f" (was {shown(before)}, is {shown(value)})"
                title = "model" if name == "weights" else name.replace("_", " ")
                changed.append(f"another {title}{values}")
        if changed:
            raise ValueError(
                f"{self.file}: its ref_logps were computed with {', '.join(changed)}; {MEND}"
            )


def sidecar_of(file: Path) -> Path:
    """Return the path of the sidecar of a data file."""
    return file.with_name(file.name + SUFFIX)


# ---- what log-probs belong to ------------------------------------------------------------------


def token_identity(tokenizer: PreTrainedTokenizerBase, options: RecordOptions) -> dict[str, Any]:
    """Return the part of an identity that decides on token ids.

    tokenizer: of the policy
    options: of the source
    """
    options = options.resolved()
    columns = {name: options.columns[name] for name in TEXTS if name in options.columns}
    limits = {name: getattr(options, name) for name in LIMITS}
    defaults = RecordOptions()
    chats = {name: getattr(options, name) for name in CHATS}
    changed = {name: value for name, value in chats.items() if value != getattr(defaults, name)}
    return {
        "tokenizer": _hash(_tokenizer_content(tokenizer)),
        "chat_template": _hash(json.dumps(tokenizer.chat_template, sort_keys=True)),
        "columns": columns,
        **limits,
        "chats": changed or None,
    }


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything that a tokenizer computes ids from, as text."""
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        # The state of the last call, not of the tokenizer.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    return json.dumps([content, str(ends)], sort_keys=True)


def model_identity(policy: Policy, run: ResolvedRun, *, new_adapter: bool) -> dict[str, Any]:
    """Return the part of an identity that decides on the numbers of a reference.

    policy: whole, with the weights of the start of a run
    run: decisions of the run
    new_adapter: what is trained was added to the model, and is no part of the reference
    """
    dtypes = run.plain()
    return {
        "weights": fingerprint(_reference_weights(policy, run.compute, new_adapter)),
        "compute_dtype": dtypes["compute"],
        "weights_dtype": dtypes["weights"],
    }


def _reference_weights(
    policy: Policy, compute: torch.dtype, new_adapter: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the reference: under the names and in the dtype of a frozen copy."""
    for name, tensor in saved_tensors(policy.model):
        if new_adapter and tensor.requires_grad:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if is_plain(tensor):
            tensor = tensor.detach().to(compute)
        yield name, tensor


def tokens_of(examples: Iterable[Example]) -> str:
    """Return a hash of the token ids of examples."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, *example.responses):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        for scored in example.scored:
            digest.update(scored.tobytes())
    return digest.hexdigest()[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- at the start of a run ---------------------------------------------------------------------


def uses_caches(config: RunConfig) -> bool:
    """Return whether a run would take its reference from the records."""
    return config.mode == "offline" and config.reference in ("auto", "cached")


def read_caches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: RecordOptions
) -> list[RefCache]:
    """Return the sidecars of the files that examples with ref_logps come from.

    examples: of a source
    tokenizer: of the policy
    options: of the source

    ValueError if a file has changed, or if its log-probs belong to other tokens.
    """
    caches = []
    for file, own in _by_file(examples).items():
        cache = RefCache.read(file) if file.is_file() else None
        if cache is None:
            continue
        cache.check_file()
        cache.refuse_others(token_identity(tokenizer, options))
        # Settings of feedback may leave records out; their tokens are not compared then.
        if len(own) == cache.records and tokens_of(own) != cache.tokens:
            raise ValueError(
                f"{file}: the tokens of its records are not those that its ref_logps were "
                f"computed on (the chat template printed {printable(cache.date)}); {MEND}"
            )
        caches.append(cache)
    return caches


def date_of_caches(config: RunConfig) -> str | None:
    """Return the date that chat templates printed for the cached log-probs of a run.

    config: settings of the run

    None without sidecars, or with several dates.
    """
    dates = set()
    for entry in config.data if uses_caches(config) else ():
        path = Path(Source.parse(entry, config.record_options()).path)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        caches = [RefCache.read(file) for file in files if file.is_file()]
        dates |= {cache.date for cache in caches if cache is not None}
    return dates.pop() if len(dates) == 1 else None


def refuse_other_model(
    caches: Sequence[RefCache], policy: Policy, run: ResolvedRun, *, new_adapter: bool
) -> None:
    """Raise ValueError, by name, if cached log-probs belong to another model or precision.

    caches: sidecars of the data
    policy, run, new_adapter: as for model_identity
    """
    if not caches:
        return
    identity = model_identity(policy, run, new_adapter=new_adapter)
    for cache in caches:
        cache.refuse_others(identity)


def verify_cached_logps(
    examples: Sequence[Example],
    caches: Sequence[RefCache],
    policy: Policy,
    scoring: Scoring,
    world: World,
) -> None:
    """Compare a few log-probs of files without a sidecar with the policy; ValueError by record.

    examples: records of a run, with ref_logps
    caches: sidecars of the data
    policy: with the weights of the start of a run, where it is the reference
    scoring: of the run
    world: the ranks; all of them must call
    """
    known = {cache.file for cache in caches}
    for file, own in _by_file(examples).items():
        if file in known:
            continue
        chosen = _shortest_of_parts(own)
        batch = collate(chosen, packed=policy.packed, device=world.device, pad_id=0)
        computed = iter(scoring.logps(policy, batch).tolist())
        for example in chosen:
            for number, response in enumerate(example.responses):
                cached, value = example.ref_logps[number], next(computed)
                allowed = NATS_PER_TOKEN * len(response) + RELATIVE * abs(value)
                if not abs(cached - value) <= allowed:
                    raise ValueError(
                        f"{example.origin}: ref_logps[{number}] is {cached:.6g}, but the model of "
                        f"the run gives {value:.6g}: it is of another model, or of other tokens; "
                        f"{MEND}"
                    )


def _by_file(examples: Iterable[Example]) -> dict[Path, list[Example]]:
    """Return the examples with ref_logps, by file."""
    files: dict[Path, list[Example]] = {}
    for example in examples:
        if example.ref_logps is not None:
            files.setdefault(Path(example.origin.rpartition(":")[0]), []).append(example)
    return files


def _shortest_of_parts(examples: Sequence[Example]) -> list[Example]:
    """Return the shortest example of every of COMPARED parts of a file."""
    chosen = []
    for part in range(COMPARED):
        start, stop = (len(examples) * k // COMPARED for k in (part, part + 1))
        if start < stop:
            chosen.append(min(examples[start:stop], key=_tokens_in))
    return chosen


def _tokens_in(example: Example) -> int:
    return len(example.prompt_ids) + sum(map(len, example.responses))
