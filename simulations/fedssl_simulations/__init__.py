"""The roof: simulation on one machine, baselines, reports, and the fedssl command.

``from fedssl_simulations import simulate, read_run`` is the whole of it from Python. Both are loaded when first asked for,
so that a command that does not train does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedssl_simulations.run import Run, simulate
    from fedssl_simulations.run_files import read_run

__all__ = ["Run", "read_run", "simulate"]

_HOMES = {"Run": "run", "simulate": "run", "read_run": "run_files"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
