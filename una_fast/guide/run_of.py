"""Find the model of a run: of a finished one, of its newest checkpoint, or a model by itself."""

from __future__ import annotations

from pathlib import Path

from una_fast.model.base_form import read_base_form
from una_fast.model.directory import ADAPTER_CONFIG
from una_fast.model.loading import model_and_adapter
from una_fast.printable import printable, shown
from una_fast.settings_file import read_settings
from una_fast.train.checkpoint import complete_checkpoints

SETTINGS = "config.yaml"


def model_of(run: str) -> str:
    """Return the directory or hub name of the weights of a run.

    run: output directory of a run, finished or not; a checkpoint; or a model of any other origin

    ValueError for a run that has saved no weights so far.
    """
    path = Path(run).expanduser()
    if not path.is_dir() or _holds_weights(path):
        return run
    whole = complete_checkpoints(path)
    if whole:
        return str(whole[-1])
    if (path / SETTINGS).is_file():
        raise ValueError(
            f"{printable(run)} is a run without a model or a checkpoint so far; let it end, or set "
            "save_every"
        )
    return run


def _holds_weights(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file()


def quantize_base_of(path: str) -> str | None:
    """Return the format of the base under an adapter, as a setting; None: plain numbers.

    path: as `model_of` returns it
    """
    form = read_base_form(model_and_adapter(path)[1])
    return None if form is None else form.quantize_base


def base_of(run: str) -> str:
    """Return the model that a run of full fine-tuning started from, by its settings.

    ValueError for a directory beside no settings of a run.
    """
    path = Path(run).expanduser().absolute()
    for directory in (path, path.parent):
        file = directory / SETTINGS
        if not file.is_file():
            continue
        try:
            model = read_settings(file).get("model")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if isinstance(model, str) and model:
            return model
        raise ValueError(f"{file}: model={shown(model)} names no model to compare with")
    raise ValueError(
        f"{printable(run)} is neither an adapter nor a run with {SETTINGS}, so that there is no "
        "model before it; leave --compare out"
    )
