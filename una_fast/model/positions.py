"""Positions of a model: how many, and whether more of them would be out of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from una_fast.data.examples import Example
from una_fast.printable import printable

_POSITIONS = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"
_OFFSETS = 8  # rows that a table may have beside the positions; OPT has 2


def positions_of(causal_lm: PreTrainedModel) -> int | None:
    """Return the tokens of the longest sequence that a model was made for; None: no such number.

    Scaled rotary positions count as scaled: some configs leave max_position_embeddings as it was
    before the scaling.
    """
    config = causal_lm.config.get_text_config()
    positions = getattr(config, _POSITIONS, None)
    if not isinstance(positions, int) or isinstance(positions, bool) or positions < 1:
        return None
    return max([positions, *_scaled(config, positions)])


def _scaled(config: PreTrainedConfig, positions: int) -> Iterator[int]:
    """Yield the positions of every scaled kind of rotary embedding in a config."""
    for rope in _ropes(config):
        factor = rope.get("factor")
        if isinstance(factor, int | float) and factor > 1:
            original = rope.get(_ORIGINAL) or positions
            yield int(original * factor)


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the parameters of rotary embeddings: one dict, or one per kind of layers."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    yield from kinds or [parameters]


def row_wide_rope(causal_lm: PreTrainedModel) -> str | None:
    """Return why the rotary positions of a token depend on the rest of the row, or None.

    Such kinds look at the largest position of the tokens at hand: a part of a row has another one.
    """
    for kind, _ in _row_wide(causal_lm):
        return (
            f"{type(causal_lm).__name__} has rotary positions of type {kind}, which depend on "
            "the largest position of the row"
        )
    return None


def rope_limits(causal_lm: PreTrainedModel) -> tuple[int, ...]:
    """Return the lengths, ascending, beyond which a row has other rotary factors; mostly ().

    A record up to a limit must not share a row, or a padded batch, with one beyond the limit: the
    longer one would change the log-probs of the shorter one.
    """
    return tuple(sorted({limit for _, limit in _row_wide(causal_lm)}))


def _row_wide(causal_lm: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield (kind, length) of rotary embeddings whose factors change beyond a length of the row."""
    config = causal_lm.config.get_text_config()
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type")))
        if kind == "longrope" or "dynamic" in kind:
            limits = [getattr(config, name, None) for name in (_ORIGINAL, _POSITIONS)]
            if kind == "longrope":
                limits.insert(0, rope.get(_ORIGINAL))
            else:  # grows beyond the positions of the config
                limits.reverse()
            yield kind, next((limit for limit in limits if limit), 0)


def longer_records(records: Sequence[Example], causal_lm: PreTrainedModel) -> str | None:
    """Look for records that are longer than the positions of a model.

    records: to be scored
    causal_lm: the model, or an outline

    ValueError, by the record, where a table of positions has no more rows. Rotary positions go on
    beyond those that the model was made for: the number of such records, in words; None without
    any.
    """
    positions = positions_of(causal_lm)
    if positions is None:
        return None
    count = sum(record.longest > positions for record in records)
    if not count:
        return None
    longest = max(records, key=lambda record: record.longest)
    told = (
        f"{count} of {len(records)} records have more tokens; the longest, "
        f"{printable(longest.origin)}, has {longest.longest}"
    )
    if has_learned_positions(causal_lm, positions):
        raise ValueError(
            f"{longest.origin}: the model has a table of {positions} positions; {told}. Set "
            f"max_tokens={positions} (prompt_overflow: truncate_left cuts prompts), or remove them"
        )
    return told


def has_learned_positions(causal_lm: PreTrainedModel, positions: int) -> bool:
    """Return whether a model looks positions up in a table, which has no row for later ones.

    causal_lm: is searched for an embedding of positions, or a computed table of the same length
    positions: of the config
    """
    decoder = causal_lm.get_decoder()
    tokens = causal_lm.get_input_embeddings()
    for module in decoder.modules():
        is_table = isinstance(module, nn.Embedding) and module is not tokens
        if is_table and positions <= module.num_embeddings <= positions + _OFFSETS:
            return True
        for name, buffer in module.named_buffers(recurse=False):
            # Cached rotary factors are computed again for longer sequences.
            rotary = name.startswith(("cos", "sin"))
            if buffer.dim() > 1 and positions in buffer.shape and not rotary:
                return True
    return False
