"""Check a model at hand against the class and the config: a probe builds a model from both alone.

Users replace modules, forwards and attention functions of a model. A few packages are trusted (the
tables below); a change by anybody else is named, and the model stays padded.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Packages whose modules, forwards and hooks stand for linear layers, norms and copies of weights.
# Among them are those of peft, which are compared with the model's own logits in our tests.
_PACKAGES = (
    "una_fast",
    "accelerate",
    "awq",
    "axolotl",
    "bitsandbytes",
    "compressed_tensors",
    "deepspeed",
    "gptqmodel",
    "hqq",
    "liger_kernel",
    "optimum",
    "peft",
    "torchao",
    "trl",
    "torch.ao",
    "torch.nn.modules.module",
    "torch.nn.utils",
    "torch.distributed",
    "torch.utils",
    "torch._dynamo",
    "transformers.activations",
    "transformers.integrations",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.pytorch_utils",
    "transformers.quantizers",
    "transformers.utils",
)
# Modules of torch that treat each token by itself.
_TOKEN_WISE = (
    "torch.nn.modules.container",
    "torch.nn.modules.dropout",
    "torch.nn.modules.linear",
    "torch.nn.modules.sparse",
)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Attention of transformers that computes softmax(scale q k + mask) v.
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def function_of(method: Any) -> Any:
    """Return the function of a method, or the function itself."""
    return getattr(method, "__func__", method)


def origin(function: Any) -> str:
    """Return the Python module of a function's own code, and not of a function wrapped inside.

    function: a function, a method, a partial function, or an object with __call__
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = function_of(function)
    # functools.wraps copies __module__, and leaves the globals alone.
    names = getattr(function, "__globals__", None)
    return type(function).__module__ if names is None else names.get("__name__", "")


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    """Return whether a Python module is a package of some packages, or inside."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_trusted(function: Any, packages: tuple[str, ...], own: Collection[Any]) -> bool:
    """Return whether a forward or a hook, and every function wrapped inside, may be trusted.

    function: a forward or a hook
    packages: their functions are trusted
    own: functions to trust, with all functions inside
    """
    while function is not None:
        if any(function_of(function) is one for one in own):
            return True
        if not is_within(origin(function), packages):
            return False
        function = getattr(function_of(function), "__wrapped__", None)
    return True


def is_flash(attn_implementation: str | None) -> bool:
    """Return whether an attention of transformers is a flash kernel."""
    return attn_implementation is not None and "flash" in attn_implementation


# ---- the attention function ----


def attention_refusal(config: PreTrainedConfig) -> str | None:
    """Return why the packed attention cannot replace the attention function of a config, or None.

    A user may register a function under a new name, or under a name of transformers.
    """
    name = config._attn_implementation
    if name not in _IMPLEMENTATIONS and not is_flash(name):
        return f"the attention implementation {name!r} is not one of transformers' own"
    for kind, table in (("", ALL_ATTENTION_FUNCTIONS), ("mask ", ALL_MASK_ATTENTION_FUNCTIONS)):
        function = table.get(name)
        if function is not None and not is_within(origin(function), ("transformers",)):
            return (
                f"the {kind}function of the attention implementation {name!r} is of "
                f"{origin(function)}, not of transformers"
            )
    return None


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs in the modules of a model, without repeats."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    return list(configs.values())


# ---- the modules ----


def module_refusal(decoder: PreTrainedModel, copy: PreTrainedModel, ran: set[Any]) -> str | None:
    """Return a reason, with the module, why a decoder is unlike its class and config, or None.

    decoder: at hand
    copy: reduced, built from class and config
    ran: forwards of the classes of the attention modules in the copy, run packed
    """
    known = {type(module).forward for module in copy.modules()}
    everywhere = [*_global_forward_pre_hooks.values(), *_global_forward_hooks.values()]
    for hook in everywhere:
        if not is_trusted(hook, _PACKAGES, ()):
            return f"all modules have a hook of {origin(hook)}"
    attentions = 0
    for name, module in decoder.named_modules():
        place = f"{name or 'the decoder'} of {type(decoder).__name__}"
        if not _is_known_class(type(module), known):
            return f"{place} is a {type(module).__name__}, which the class does not build"
        for function in _added_functions(module):
            if not is_trusted(function, _PACKAGES, known):
                return (
                    f"{place} has a forward or a hook of {origin(function)}; one that changes "
                    "nothing may be added after the patch"
                )
        attentions += type(module).forward in ran
    layers = decoder.config.num_hidden_layers
    if attentions != layers:
        return f"{type(decoder).__name__} has {attentions} attention modules for {layers} layers"
    return None


def _is_known_class(kind: type, known: set[Any]) -> bool:
    forward = kind.forward
    # A class made by FSDP or by a parametrization has the forward of the class inside.
    if forward in known or forward in [norm.forward for norm in _NORMS]:
        return True
    if is_within(origin(forward), ("torch.nn.modules.activation",)):
        return not issubclass(kind, nn.MultiheadAttention)
    return is_within(origin(forward), (*_PACKAGES, *_TOKEN_WISE))


def _added_functions(module: nn.Module) -> Iterator[Any]:
    """Yield the forwards and hooks of a module beside the forward of the class."""
    yield from added_forwards(module)
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def added_forwards(module: nn.Module) -> Iterator[Any]:
    """Yield the forwards of a module beside the forward of the class, and hooks of accelerate."""
    names = ("forward", "_old_forward", "_hf_hook")
    yield from (module.__dict__[name] for name in names if name in module.__dict__)
    yield from getattr(module.__dict__.get("_hf_hook"), "hooks", ())


# ---- the layers of a call ----


class Ran:
    """The attention modules run by a packed forward: its argument `una_ran`."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


def check_ran(model: PreTrainedModel, ran: Ran) -> None:
    """Raise ValueError for a layer without a run of the packed attention, with its name.

    model: has just run a packed row
    ran: of that row
    """
    decoder = model.get_decoder()
    config = decoder.config
    found = {id(module) for module in ran.modules}
    # Set on the module, as the config's is read once.
    rates = (getattr(holder, "layerdrop", 0) for holder in (config, decoder))
    drops_layers = decoder.training and any(rates)
    if len(found) >= config.num_hidden_layers or drops_layers:
        return
    lacking = []
    for name, layers in decoder.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers:
            for index, layer in enumerate(layers):
                if found.isdisjoint(map(id, layer.modules())):
                    lacking.append(f"{name}.{index} ({type(layer).__name__})")
    named = f": {', '.join(lacking)}" if lacking else ""
    raise ValueError(
        f"{len(found)} of {config.num_hidden_layers} layers of {type(model).__name__} ran the "
        f"packed attention{named}; a layer has changed since the patch: call patch_model(model) "
        "again, which pads, or give pack=False"
    )
