# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each test needs beside Python and the engine, found in its code and given to it as markers.

server   NFS-Ganesha, root or nbdkit
fake     a fake server, kernel or systemd, or the proxy: such tests wait in real time

A test needs what it names, and what its fixtures and the functions of tests/ name that it uses. What cannot be seen so
(a script for another process) has its marker in its file. `make unit` runs the tests that have neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from support.fake_kernel import FakeKernel
from support.fake_nas import FakeNas
from support.fake_nfs import FakeNfsServer
from support.fake_systemd import FakeSystemd
from support.keeper_run import FakeSwap, run_keeper
from support.nfs_server import Ganesha
from support.proxy import TcpProxy
from support.small_filesystem import small_filesystem
from support.sunrpc import RpcServer
from support.worker_process import serving

# Functions and classes, and the words that stand in command lines.
NEEDS: dict[str, tuple[object, ...]] = {
    "server": (Ganesha, small_filesystem, serving, FakeSwap, "nbdkit", "serve"),
    "fake": (FakeNas, FakeNfsServer, RpcServer, FakeKernel, FakeSystemd, TcpProxy, run_keeper),
}


def mark(items: list[pytest.Item]) -> None:
    """Give each test the markers for what it needs."""
    finders = {marker: _Finder(things) for marker, things in NEEDS.items()}
    for item in items:
        if isinstance(item, pytest.Function):
            functions = list(_functions(item))
            for marker, finder in finders.items():
                if any(finder.needs(function) for function in functions):
                    item.add_marker(marker)


def _functions(item: pytest.Function) -> Iterator[Callable[..., Any]]:
    """The test and the fixtures that it uses, directly or through others."""
    yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield definitions[-1].func


class _Finder:
    """Follows names from function to function, each once."""

    def __init__(self, things: tuple[object, ...]) -> None:
        self._things = things
        self._known: dict[object, bool] = {}

    def needs(self, named: object) -> bool:
        """Whether it is one of the things, or names one of them, or names something of tests/ that does."""
        if any(named is thing or (isinstance(named, str) and named == thing) for thing in self._things):
            return True
        functions = tuple(_functions_of_tests(named))
        if functions not in self._known:
            self._known[functions] = False  # against circles
            found = (self.needs(other) for function in functions for other in _named_in(function))
            self._known[functions] = any(found)
        return self._known[functions]


def _functions_of_tests(named: object) -> Iterator[FunctionType]:
    """A function of tests/ itself, the methods of a class of tests/; nothing for what comes from elsewhere."""
    values = list(vars(named).values()) if isinstance(named, type) else [getattr(named, "__wrapped__", named)]
    for value in values:
        if isinstance(value, FunctionType) and "/tests/" in value.__code__.co_filename:
            yield value


def _named_in(function: FunctionType) -> Iterator[object]:
    """The globals that a function names, and its strings, also in functions inside it."""
    codes: list[CodeType] = [function.__code__]
    while codes:
        code = codes.pop()
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                codes.append(constant)
            yield from constant if isinstance(constant, tuple) else (constant,)
        for name in code.co_names:
            named = function.__globals__.get(name)
            yield named
            if isinstance(named, ModuleType):
                yield from (vars(named).get(attribute) for attribute in code.co_names)
