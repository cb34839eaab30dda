"""The extras of the installation: the op needs torch alone, the commands need more packages."""

from __future__ import annotations

# Module -> the extra of setup.py with the package of the module.
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
            # dependencies of the others
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
    """Return the command to install an extra, for messages."""
    return f'pip install "una-fast[{extra}]", or pip install -e ".[{extra}]" in a clone'


def missing_extra(error: BaseException) -> str | None:
    """Return the message of a failed import of a module of an extra; None for any other error.

    error: raised by a command
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.split(".")[0]
    extra = EXTRA_OF.get(module)
    if extra is None:
        return None
    return f"needs {module}, which is not installed: {install_line(extra)}"
