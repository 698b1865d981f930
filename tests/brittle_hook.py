"""Lets Ray's workers know the brittle network, once they import timm: most of them never do, and it takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def known() -> None:
    """Called in each worker process when it starts."""
    sys.meta_path.insert(0, AfterTimm())  # type: ignore[arg-type]


class AfterTimm:
    """Finds timm as everyone does, and imports the network when it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def and_ours(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("tests.brittle")

        spec.loader.exec_module = and_ours  # type: ignore[method-assign]
        return spec
