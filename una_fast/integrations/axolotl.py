"""axolotl: `rl: dpo`, `ipo` and `kto` on log-probs made without logits.

    plugins:
      - una_fast.integrations.axolotl.UNAPlugin

axolotl imports this module while reading the config, and goes on without the plugin after an
ImportError. Therefore the module imports the op, axolotl's base class and pydantic alone;
`UNAPlugin.register` imports the trainers, and an error of `register` ends the run.

axolotl's builder for `rl` drops model and reference from the arguments of a class given by
`get_trainer_cls`. The plugin sets `trainer_cls` in the config instead, a path resolved by the
builder, beside model and reference.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field

from una_fast.integrations.calls import una_calls
from una_fast.integrations.versions import TESTED, check_version
from una_fast.logs import say_once
from una_fast.losses import Objective

TRAINERS = {"dpo": "UNADPOTrainer", "ipo": "UNADPOTrainer", "kto": "UNAKTOTrainer"}
INSTEAD = {
    "orpo": "it has no reference model",
    "simpo": "it has no reference model",
    "grpo": "it needs TRL 1.15 or newer: una_fast.integrations.trl.UNAGRPOTrainer outside axolotl",
    "gdpo": "it needs TRL 1.15 or newer: una_fast.integrations.trl.UNAGRPOTrainer outside axolotl",
}
_WAY_OUT = "Set una_head: false, or remove the plugin"
_logger = logging.getLogger("axolotl.una_fast")  # shown among axolotl's own lines
_options: dict[str, Any] = {}  # of the config in force, for the trainer that axolotl builds


def _described(default: Any, description: str) -> Any:
    """Return a field of the config, with a description for axolotl's reference."""
    return Field(default=default, json_schema_extra={"description": description})


class UNAArgs(BaseModel):
    """The plugin's keys of a config.

    una_head: False switches the plugin off
    una_pack: as of patch_model
    una_workspace_mb: MiB of the fused head, see linear_una_loss
    una_objective: fields of una_fast.Objective, in place of TRL's losses; beta is rl_beta
    """

    una_head: bool = _described(True, "Take log-probs from una_fast's head, without logits")
    una_pack: bool | Literal["auto"] = _described(
        "auto", "Compute a prompt once for the rows that share it"
    )
    una_workspace_mb: float | None = _described(None, "Logits held at a time, in MiB")
    una_objective: dict[str, Any] | None = _described(None, "Fields of una_fast.Objective")


class UNAPlugin(BasePlugin):
    """Trains `rl: dpo`, `ipo` and `kto` without logits; see `UNAArgs` for the keys."""

    def get_input_args(self) -> str:
        return f"{__name__}.UNAArgs"

    def register(self, cfg: Any) -> None:
        """Refuse configs out of reach of una_fast, before anything is loaded."""
        if _is_wanted(cfg):
            check_version("axolotl")
            _check(cfg)
            _load_trainers()

    def pre_model_load(self, cfg: Any) -> None:
        """Name our trainer in the config, and keep its options for the trainer."""
        if not _is_wanted(cfg):
            return
        _check(cfg)
        cfg.trainer_cls = _trainer_path(cfg)
        _options.clear()
        _options.update(
            una_pack=cfg.get("una_pack", "auto"),
            una_workspace_mb=cfg.get("una_workspace_mb"),
            objective=_objective(cfg),
        )

    def post_train(self, cfg: Any, model: Any) -> None:
        """Say how many calls gave log-probs, and how many used TRL's logits."""
        if _is_wanted(cfg):
            calls = una_calls()
            served = calls["packed"] + calls["padded"]
            level = logging.INFO if served else logging.WARNING
            others = f"{calls['fell_back']} batches used TRL's logits"
            message = f"{served} calls gave log-probs without logits, {others}"
            say_once(level, message, _logger)  # axolotl calls this hook twice


def _is_wanted(cfg: Any) -> bool:
    """Return whether a config lists the plugin and leaves `una_head` on.

    axolotl keeps a plugin registered for later configs of a process.
    """
    names = [str(name) for name in cfg.get("plugins") or []]
    return f"{__name__}.UNAPlugin" in names and cfg.get("una_head") is not False


def _rl_of(cfg: Any) -> str | None:
    """Return the name of the method: a text before validation, an enum after."""
    rl = cfg.get("rl")
    return getattr(rl, "value", rl)


def _trainer_path(cfg: Any) -> str:
    return f"{__name__}.{TRAINERS[_rl_of(cfg)]}"


def _check(cfg: Any) -> None:
    """Raise ValueError, by the key and the way out, for a config out of reach of una_fast."""
    rl = _rl_of(cfg)
    if rl not in TRAINERS:
        why = f"rl: {rl} is not among them" if rl else "this config has no rl"
        reason = f" ({INSTEAD[rl]})" if rl in INSTEAD else ""
        raise ValueError(f"UNAPlugin trains rl: dpo, ipo and kto; {why}{reason}. {_WAY_OUT}")
    own = cfg.get("trainer_cls")
    if own and own != _trainer_path(cfg):
        raise ValueError(f"trainer_cls: {own} would replace una_fast's trainer. {_WAY_OUT}")
    if cfg.get("dpo_use_liger_kernel"):
        raise ValueError(
            "dpo_use_liger_kernel: true replaces the head that una_fast replaces; remove one of "
            f"them. {_WAY_OUT}"
        )
    if (cfg.get("context_parallel_size") or 1) > 1:
        raise ValueError(f"context_parallel_size splits the rows that una_fast scores. {_WAY_OUT}")
    _objective(cfg)


def _objective(cfg: Any) -> Objective | None:
    """Return the objective of a config, with the run's beta; None: TRL's loss.

    ValueError for an unknown field, and beside another key for the loss.
    """
    given = cfg.get("una_objective")
    if given is None:
        return None
    if _rl_of(cfg) == "ipo" or cfg.get("dpo_loss_type"):
        key = "rl: ipo" if _rl_of(cfg) == "ipo" else "dpo_loss_type"
        raise ValueError(f"una_objective and {key} both name the loss; keep one of them")
    fields = sorted(Objective.__dataclass_fields__)
    if not isinstance(given, dict):
        raise ValueError(f"una_objective: {given} has no fields; give some of {fields}")
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ValueError(f"una_objective has no field {unknown[0]}; its fields are {fields}")
    return Objective(**{"beta": _beta(cfg), **given})


def _beta(cfg: Any) -> float:
    """Return the beta given to TRL by axolotl, or else TRL's default."""
    of_trl = (cfg.get("trl") or {}).get("beta")
    beta = cfg.get("rl_beta") if of_trl is None else of_trl
    return 0.1 if beta is None else float(beta)


def _load_trainers() -> None:
    """Import the trainers; RuntimeError if an import fails."""
    try:
        for name in set(TRAINERS.values()):
            _trainer(name)
    except ImportError as error:
        raise RuntimeError(
            f"una_fast's trainers cannot be imported beside this axolotl: {error}. "
            f"They were tested with {TESTED['axolotl'].releases}. {_WAY_OUT}"
        ) from error
    from una_fast.integrations.trl_before_seam import check_no_seam

    check_no_seam()


@functools.cache
def _trainer(name: str) -> type:
    """Build axolotl's trainer with our log-probs before it."""
    from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer

    from una_fast.integrations.trl_before_seam import LabelLogProbs, PairLogProbs

    parts = {
        "UNADPOTrainer": (PairLogProbs, AxolotlDPOTrainer),
        "UNAKTOTrainer": (LabelLogProbs, AxolotlKTOTrainer),
    }
    return type(name, (_FromConfig, *parts[name]), {"__module__": __name__})


class _FromConfig:
    """Gives a trainer the options of the config; axolotl's builder gives all other arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_options, **kwargs)


def __getattr__(name: str) -> type:
    """Return a trainer by its path in `trainer_cls`."""
    if name in TRAINERS.values():
        return _trainer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
