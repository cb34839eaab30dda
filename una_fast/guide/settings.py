"""The settings of `una-fast merge`, `chat`, `data`, `init` and `check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from una_fast.capacity.settings import GPU_GIB
from una_fast.checks import check_at_least, check_choices, check_types
from una_fast.config import Device, Precision
from una_fast.data.settings import RecordOptions
from una_fast.flags import in_place
from una_fast.printable import shown

Task = Literal["auto", "pairs", "labels", "scores", "online", "long"]


@dataclass
class MergeConfig:
    """An adapter, and the directory of the merged model."""

    run: str = field(metadata=in_place("RUN"))
    """Finished run, checkpoint or adapter directory."""
    output_dir: str = ""
    """New directory of the merged model. Required."""
    trust_remote_code: bool = False
    """Run model code that comes with the base model."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.output_dir:
            raise ValueError("output_dir is missing; set --output_dir")


@dataclass
class ChatConfig:
    """The model that answers, and how."""

    run: str = field(metadata=in_place("RUN"))
    """Finished run, checkpoint, model or adapter directory, or hub name."""
    compare: bool = False
    """Show the answers before the run (of the base model) beside those after it."""
    prompt: str | None = None
    """Answer one prompt, and end; null: a conversation, or a prompt per line of the input."""
    temperature: float = 0.0
    """Sampling temperature; 0: the likeliest token every time."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int = 0
    """Seed of the samples."""
    precision: Precision = "auto"
    """Dtype of the weights; auto: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """Device of the model."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(0, self, ["temperature", "seed"])
        check_at_least(1, self, ["max_new_tokens"])
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; give a text, or leave --prompt out")


@dataclass
class DataSource:
    """Data, and the model that would be trained on it."""

    data: str = field(metadata=in_place("FILE"))
    """File, directory or dataset name."""
    model: str = ""
    """Model directory or hub name, for its tokenizer and template. Required."""
    online: bool = False
    """Read prompts to sample from, not records with feedback."""
    n: int = 3
    """Records to show."""
    split: str = "train"
    """Split of a dataset name."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


# Python collects the fields of a dataclass from the last base to the first.
@dataclass
class DataConfig(RecordOptions, DataSource):
    """Data to look at, read as a run reads it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model is missing; set --model")
        check_at_least(0, self, ["n"])

    def record_options(self) -> RecordOptions:
        """Return the settings of the records."""
        names = RecordOptions.__dataclass_fields__
        return RecordOptions(**{name: getattr(self, name) for name in names})


@dataclass
class InitConfig:
    """Model, data and task of the run to be configured."""

    model: str = ""
    """Model directory or hub name. Required."""
    data: str = ""
    """File, directory or dataset name. Required."""
    task: Task = "auto"
    """pairs | labels | scores | online | long (all switches to save memory); auto: by the data."""
    out: str = "run.yaml"
    """File to write; an existing file is left alone."""
    output_dir: str = "runs/una"
    """Directory of the run."""
    gpu: str | None = None
    """GPU to fit: H200, H100, B200, A100, A100-40GB, L40S, RTX4090; null: this machine."""
    memory_gib: float | None = None
    """GiB to fit instead; null: all of the device."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        for name in ("model", "data", "out", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; set --{name}")
        if self.gpu is not None and self.gpu not in GPU_GIB:
            raise ValueError(
                f"gpu={shown(self.gpu)} is not one of {', '.join(GPU_GIB)}; give memory_gib instead"
            )
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"memory_gib={self.memory_gib} must be positive, or null")


@dataclass
class CheckConfig:
    """Model to look at besides the installation."""

    model: str | None = None
    """Model directory or hub name to probe: its head, and whether its rows can be packed."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def __post_init__(self) -> None:
        check_types(self)
