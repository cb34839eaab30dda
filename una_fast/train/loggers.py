"""Logging back-ends of a run besides metrics.jsonl: tensorboard, wandb, trackio.

A resumed run goes on in the same run of wandb and trackio: loggers.json in the output directory
holds the ids. A back-end that fails while the run is under way is left out with a warning.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol

from una_fast.config import RunConfig
from una_fast.files import write_json
from una_fast.printable import told

IDS = "loggers.json"

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """A logging back-end."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self, *, failed: bool) -> None:
        """End the run there."""


class Loggers:
    """The back-ends of a run."""

    def __init__(self, config: RunConfig, output_dir: Path, first_step: int) -> None:
        """Open the back-ends in config.loggers.

        config: settings of the run; the back-ends are told them without secrets
        output_dir: of the run
        first_step: steps taken already; 0 starts new runs

        ValueError for a back-end that is not installed, or does not start.
        """
        self.backends: dict[str, Backend] = {}
        ids = _read_ids(output_dir) if first_step else {}
        for name in config.loggers:
            if name == "tensorboard":
                self.backends[name] = _TensorBoard(output_dir, first_step)
                continue
            run = _Run(name, config, output_dir, ids.get(name))
            self.backends[name] = run
            ids[name] = run.id
        if ids:
            write_json(output_dir / IDS, ids)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Give the metrics of a step to every back-end."""
        for name, backend in list(self.backends.items()):
            try:
                backend.write(step, metrics)
            except Exception as error:  # of a server, a disk: no reason to lose the run
                del self.backends[name]
                logger.warning(
                    f"loggers: {name} failed at step {step} and gets no further metrics, which "
                    f"metrics.jsonl has: {type(error).__name__}: {error}"
                )

    def close(self, *, failed: bool) -> None:
        """End the runs of all back-ends, after an error or not."""
        for name, backend in self.backends.items():
            try:
                backend.close(failed=failed)
            except Exception as error:
                logger.warning(f"loggers: {name} was not closed: {type(error).__name__}: {error}")
        self.backends = {}


class _TensorBoard:
    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step + 1 if first_step else None
        self.board = SummaryWriter(output_dir / "tensorboard", purge_step=purge_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)
        self.board.flush()

    def close(self, *, failed: bool) -> None:
        self.board.close()


class _Run:
    """A run of wandb or trackio, a new one or the one with the id.

    id: to go on with; the name of the run for trackio, which has no other
    """

    def __init__(self, name: str, config: RunConfig, output_dir: Path, known: str | None) -> None:
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise ValueError(
                f"loggers: {name} is not installed; pip install {name}, or remove it from loggers"
            ) from None
        self.by_name = name == "trackio"
        options: dict[str, Any] = {"name": output_dir.name, "config": config.shareable()}
        if known is not None:
            options["name" if self.by_name else "id"] = known
            options["resume"] = "allow"
        try:
            self.run = module.init(project="una-fast", **options)
        except Exception as error:  # no key, no server: classes of the package's own
            raise ValueError(
                f"loggers: {name} did not start ({type(error).__name__}: {told(error)}); mend "
                f"it, or remove {name} from loggers"
            ) from None
        self.id = str(getattr(self.run, "name" if self.by_name else "id", None) or output_dir.name)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self, *, failed: bool) -> None:
        if self.by_name:
            self.run.finish()
        else:
            self.run.finish(exit_code=int(failed))


def _read_ids(output_dir: Path) -> dict[str, str]:
    """Return the ids of the runs of an earlier part; a missing or damaged file holds none."""
    try:
        ids = json.loads((output_dir / IDS).read_text(encoding="utf-8"))
        return {str(name): str(known) for name, known in ids.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        logger.warning(f"{output_dir / IDS} is damaged; loggers begin new runs")
        return {}
