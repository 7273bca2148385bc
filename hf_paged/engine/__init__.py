"""The engine: requests, blocks, steps. `hf_paged.engine(model)` is the public way in, so this package is
callable too."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """`hf_paged.engine` names both this package and a public function: importing any submodule binds the package to
    the name, so the package has to answer the call."""

    def __call__(self, model: Any) -> Any:
        return importlib.import_module("hf_paged.api").engine(model)


sys.modules[__name__].__class__ = _CallablePackage
