"""Rewards by Python functions."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import itertools
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from una_fast.printable import printable, shown
from una_fast.rewards.outcome import Failure, Outcome, PromptText, Reward, redacted
from una_fast.rewards.settings import RewardError, RewardSpec, split_function
from una_fast.rewards.shelter import guarded

MEND = "return a list of numbers or None"


class FunctionReward(Reward):
    """A function f(prompts, completions, **columns) -> [S] numbers or None.

    Arguments are given by name. A function without **kwargs gets the arguments of the signature.
    The numbers may come as a list, a tuple, an iterator, or an array or tensor of one dimension;
    True and False are 1 and 0.
    """

    def __init__(self, spec: RewardSpec) -> None:
        """Import the function; ValueError if the import fails or the signature does not fit."""
        self.where = f"reward {spec.name}: function {printable(spec.target)}"
        self.function: Callable[..., Any] = self._load(spec)
        called = getattr(self.function, "__call__", None)  # noqa: B004 - of an object of a class
        if any(map(_is_async, (self.function, called))):
            raise ValueError(f"{self.where} is async, which is not awaited; give a plain function")
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (ValueError, TypeError):
            raise ValueError(
                f"{self.where} has no signature to read; wrap it in a function of Python"
            ) from None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.named = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty]
        if not self.takes_all and "completions" not in self.named:
            raise ValueError(
                f"{self.where} must take prompts and completions by these names, not "
                f"{shown(self.named)}"
            )

    def _load(self, spec: RewardSpec) -> Callable[..., Any]:
        place, attribute = split_function(spec.target)
        self.folder = Path(place).resolve().parent if place.endswith(".py") else Path.cwd()
        where = f"{self.where} cannot be imported: the import"
        module = guarded(lambda: _import(place, self.folder), where, ValueError)
        function: Any = module
        for name in attribute.split("."):
            function = getattr(function, name, None)
        if not callable(function):
            found = getattr(module, "__file__", None) or place
            raise ValueError(
                f"{self.where} cannot be called: {printable(found)} has no function "
                f"{printable(attribute)}"
            )
        return function

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; RewardError for an exception, or an answer of the wrong form."""
        arguments = self._arguments(prompts, completions, columns)

        def call() -> list[Any]:
            with findable(self.folder):  # a function may import when it is called
                return self._listed(self.function(**arguments), len(completions))

        values = guarded(call, self.where, RewardError)
        return [self._outcome(value) for value in values]

    def _arguments(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        given = {**columns, "prompts": prompts, "completions": completions}
        for name in self.needed:
            if name not in given:
                known = ", ".join(printable(column) for column in columns) or "none"
                raise RewardError(
                    f"{self.where} needs column {name!r}, which the records lack; columns: {known}"
                )
        names = given if self.takes_all else [name for name in given if name in self.named]
        # Copies, which a function may change: the records are read again in later steps.
        return {name: copy.deepcopy(list(given[name])) for name in names}

    def _listed(self, values: Any, count: int) -> list[Any]:
        """Return the answer of the function as a list; RewardError for another form or length."""
        if inspect.isawaitable(values):
            if inspect.iscoroutine(values):
                values.close()
            raise RewardError(f"{self.where} returned a coroutine, which is not awaited; {MEND}")
        kind = type(values).__name__
        if hasattr(values, "tolist") and hasattr(values, "ndim"):
            if values.ndim != 1 or _is_time(values):
                shape = tuple(getattr(values, "shape", ()))
                raise RewardError(
                    f"{self.where} returned {kind} of shape {shape} and dtype "
                    f"{getattr(values, 'dtype', None)}; {MEND}"
                )
            values = values.tolist()
        unordered = (str, bytes, bytearray, Mapping, Set)
        if isinstance(values, unordered) or not isinstance(values, Iterable):
            raise RewardError(f"{self.where} returned {kind}; {MEND}")
        # No more than needed: an iterator may have no end.
        found = list(itertools.islice(values, count + 1))
        if len(found) != count:
            sized = len(values) if hasattr(values, "__len__") else len(found)
            number = f"{sized} or more" if sized > count else sized
            raise RewardError(
                f"{self.where} returned {number} rewards for {count} completions; return one for "
                "each, None where there is none"
            )
        return found

    def _outcome(self, value: object) -> Outcome:
        if value is None:
            return Failure("None")
        number = guarded(lambda: _as_float(value), f"{self.where}: a reward", RewardError)
        if number is None:
            given = f"{type(value).__name__} {redacted(shown(value))}"
            raise RewardError(
                f"{self.where} returned {given} among its rewards; return numbers (float(...)) or "
                "None"
            )
        return number


def _as_float(value: Any) -> float | None:
    """Return a real number of any kind as a float; None for other values."""
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or torch
        if _is_time(value):
            return None
        value = value.item()
    if not isinstance(value, (numbers.Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:  # beyond the floats
        return float("inf")


def _is_time(array: Any) -> bool:
    """Return whether an array of NumPy holds dates or spans of time, which become integers."""
    return getattr(getattr(array, "dtype", None), "kind", "") in ("m", "M")


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _import(place: str, folder: Path) -> ModuleType:
    """Import a module by dotted name, or a .py file by path; its folder may hold more of them."""
    with findable(folder):
        if place.endswith(".py"):
            return _import_file(Path(place).resolve())
        return importlib.import_module(place)


@contextlib.contextmanager
def findable(folder: Path) -> Iterator[None]:
    """Find modules of a folder too, behind all others, inside the block.

    Afterwards they are not found any more: other packages look for optional ones by name, and a
    file here must not be taken for one.
    """
    here = str(folder)
    if here in sys.path:
        yield
        return
    importlib.invalidate_caches()
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the function may have removed it
            sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {printable(path)}")
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
