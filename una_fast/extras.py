"""What the extras of the installation bring: the op alone needs torch, the commands need more."""

from __future__ import annotations

# Modules that a package may lack -> the extra of setup.py that installs the module.
EXTRA_OF = {
    **dict.fromkeys(
        (
            "numpy",
            "transformers",
            "peft",
            "datasets",
            "safetensors",
            "yaml",
            "tqdm",
            "tensorboard",
            "matplotlib",
            "jinja2",
            "markupsafe",
            # these come with the others
            "accelerate",
            "huggingface_hub",
            "tokenizers",
        ),
        "train",
    ),
    "gguf": "gguf",
    "liger_kernel": "liger",
    "torchao": "optim",
    "trl": "trl",
}


def install_line(extra: str) -> str:
    """Return the command that installs an extra, for messages."""
    return f'pip install "una-fast[{extra}]", or pip install -e ".[{extra}]" in a clone'


def missing_extra(error: BaseException) -> str | None:
    """Return the message of a failed import that an extra mends; None for any other error.

    error: raised by the import of a module that is not installed
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.split(".")[0]
    extra = EXTRA_OF.get(module)
    if extra is None:
        return None
    return f"needs {module}, which is not installed: {install_line(extra)}"
