"""Rewards by Python functions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from una_fast.rewards.outcome import EXCERPT, Failure, Outcome, PromptText, Reward, as_number
from una_fast.rewards.settings import RewardError, RewardSpec, split_function

if TYPE_CHECKING:
    pass


# --- functions --------------------------------------------------------------------------------------------------------


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        # At the end of the path: a folder here must not hide an installed package.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = "una_fast_reward" + re.sub(r"\W", "_", str(path))
    if name not in sys.modules:  # functions of one file share their module, as with any import
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class FunctionReward(Reward):
    """f(prompts, completions, **columns) -> [S] numbers or None. Arguments are given by name, and a function without
    **kwargs gets those that it names."""

    def __init__(self, spec: RewardSpec) -> None:
        self.where = f"reward {spec.name}: function {spec.target}"
        place, attribute = split_function(spec.target)
        try:
            module = _import(place)
        except Exception as error:  # any code may run in there
            raise ValueError(
                f"{self.where} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        function: Any = module
        for part in attribute.split("."):
            function = getattr(function, part, None)
        if not callable(function):
            found = getattr(module, "__file__", None) or place
            raise ValueError(f"{self.where} cannot be called: {found} has no function {attribute}")
        self.function: Callable[..., Any] = function
        parameters = inspect.signature(function).parameters.values()
        self.all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.named = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty]
        if not self.all and "completions" not in self.named:
            raise ValueError(
                f"{self.where} must take prompts and completions by these names, not {self.named}"
            )

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        count = len(completions)
        given = {**columns, "prompts": prompts, "completions": completions}
        given = {
            name: list(values) for name, values in given.items()
        }  # a function may change its own
        for name in self.needed:
            if name not in given:
                known = ", ".join(columns) or "none"
                raise RewardError(
                    f"{self.where} needs column {name!r}, which the records lack; columns: {known}"
                )
        if not self.all:
            given = {name: value for name, value in given.items() if name in self.named}
        try:
            values = self.function(**given)
        except Exception as error:
            raise RewardError(f"{self.where} raised {type(error).__name__}: {error}") from error
        if hasattr(values, "tolist"):  # arrays and tensors
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"{self.where} returned {type(values).__name__}; return a list of numbers or None"
            )
        if len(values) != count:
            raise RewardError(
                f"{self.where} returned {len(values)} rewards for {count} completions; return one for each, None where "
                "there is none"
            )
        return [self._outcome(value) for value in values]

    def _outcome(self, value: object) -> Outcome:
        if value is None:
            return Failure("None")
        number = as_number(value.item() if getattr(value, "ndim", None) == 0 else value)
        if number is None:
            shown = f"{type(value).__name__} {value!r:.{EXCERPT}}"
            raise RewardError(
                f"{self.where} returned {shown} among its rewards; return numbers (float(...)) or None"
            )
        return number
