"""Reward functions of a user's file or module, in TRL's signature: found and checked before anything is trained."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmrpt.settings import SettingsError

RewardFunction = Callable[..., Any]  # a list of float or None, one a completion, or an awaitable of it
# What a run calls its reward functions with, each with one entry a completion.
COLUMNS = ("prompts", "completions", "completion_ids", "answer", "id", "example_id", "masked_caption")


def load_rewards(places: Iterable[str]) -> dict[str, RewardFunction]:
    """The functions at `file.py:function` or `package.module:function`, by the name of the function.

    A file is run once, whatever the number of its functions. Raises SettingsError with the remedy.
    """
    modules: dict[str, ModuleType] = {}
    found = {}
    for place in places:
        where, _, name = place.rpartition(":")
        try:
            module = modules[where] if where in modules else modules.setdefault(where, _import(where))
        except Exception as error:  # whatever the user's code raises
            raise SettingsError(
                f"reward.custom names {place!r}, which cannot be loaded ({type(error).__name__}: {error}): expected "
                "file.py:function, the path from the folder where the command is run, or package.module:function."
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            here = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
            raise SettingsError(f"reward.custom names {place!r}: {where} has no function {name!r}, but {here}.")
        _check_signature(place, function)
        found[name] = function
    return found


def results_of(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Each term's values; those that are awaited are awaited together."""
    waiting = {name: values for name, values in terms.items() if inspect.isawaitable(values)}
    if not waiting:
        return dict(terms)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*waiting.values())

    done = asyncio.run_coroutine_threadsafe(all_of_them(), _event_loop()).result()
    return dict(terms) | dict(zip(waiting, done, strict=True))


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all rounds, so that clients keep their connections; in a thread, as notebooks have a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _import(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).expanduser().resolve(strict=True)
    name = f"custom_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _check_signature(place: str, function: RewardFunction) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(COLUMNS))
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise SettingsError(
            f"reward.custom names {place!r}, which cannot be called with {', '.join(COLUMNS)} ({error}): expected "
            "TRL's signature, def f(completions, **columns) or def f(prompts, completions, **columns)."
        ) from error
