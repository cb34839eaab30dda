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
from typing import Any

from una_fast.rewards.outcome import EXCERPT, Failure, Outcome, PromptText, Reward, as_number
from una_fast.rewards.settings import RewardError, RewardSpec, split_function


class FunctionReward(Reward):
    """A function f(prompts, completions, **columns) -> [S] numbers or None.

    Arguments are given by name. A function without **kwargs gets the arguments of the signature.
    """

    def __init__(self, spec: RewardSpec) -> None:
        """Import the function; ValueError if the import fails or the signature does not fit."""
        self.where = f"reward {spec.name}: function {spec.target}"
        self.function: Callable[..., Any] = self._load(spec)
        parameters = inspect.signature(self.function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.named = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty]
        if not self.takes_all and "completions" not in self.named:
            raise ValueError(
                f"{self.where} must take prompts and completions by these names, not {self.named}"
            )

    def _load(self, spec: RewardSpec) -> Callable[..., Any]:
        place, attribute = split_function(spec.target)
        try:
            module = _import(place)
        except Exception as error:  # any code may run in there
            raise ValueError(
                f"{self.where} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        function: Any = module
        for name in attribute.split("."):
            function = getattr(function, name, None)
        if not callable(function):
            found = getattr(module, "__file__", None) or place
            raise ValueError(f"{self.where} cannot be called: {found} has no function {attribute}")
        return function

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; RewardError for an exception, or an answer of the wrong form."""
        arguments = self._arguments(prompts, completions, columns)
        try:
            values = self.function(**arguments)
        except Exception as error:
            raise RewardError(f"{self.where} raised {type(error).__name__}: {error}") from error
        if hasattr(values, "tolist"):  # arrays and tensors
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"{self.where} returned {type(values).__name__}; return a list of numbers or None"
            )
        if len(values) != len(completions):
            raise RewardError(
                f"{self.where} returned {len(values)} rewards for {len(completions)} completions; "
                "return one for each, None where there is none"
            )
        return [self._outcome(value) for value in values]

    def _arguments(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        given = {**columns, "prompts": prompts, "completions": completions}
        for name in self.needed:
            if name not in given:
                known = ", ".join(columns) or "none"
                raise RewardError(
                    f"{self.where} needs column {name!r}, which the records lack; columns: {known}"
                )
        names = given if self.takes_all else [name for name in given if name in self.named]
        return {name: list(given[name]) for name in names}  # copies, which a function may change

    def _outcome(self, value: object) -> Outcome:
        if value is None:
            return Failure("None")
        if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or torch
            value = value.item()
        number = as_number(value)
        if number is None:
            shown = f"{type(value).__name__} {value!r:.{EXCERPT}}"
            raise RewardError(
                f"{self.where} returned {shown} among its rewards; "
                "return numbers (float(...)) or None"
            )
        return number


def _import(place: str) -> ModuleType:
    """Import a module by dotted name, or a .py file by path."""
    if place.endswith(".py"):
        return _import_file(Path(place).resolve())
    # At the end of the path: a folder here must not hide an installed package.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(place)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = "una_fast_reward" + re.sub(r"\W", "_", str(path))
    if name in sys.modules:  # functions of one file share their module, as with any import
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before the module runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return sys.modules[name]
