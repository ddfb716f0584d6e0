# mypy: disable-error-code="import-untyped,no-untyped-call"
"""Functions compiled as parts of others: simplified once, then optimised and made machine code with their caller.

Numba does both for every compiled function with all that it calls, and again for each of its callers: with 45 stages,
of which only the entry point is ever run, that was 12 of the 20 s that `balanced` took to compile. A `Part` stays what
LLVM calls a module until an entry point links it.

`pipeline_class` is Numba's documented place for such a change. That a pass takes `state.library` if it is there, and
the names that Part overrides, are not documented: where a Numba lacks them, stages are compiled as any function, with
the same bits and more time.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

# They look for closures, expressions of whole arrays, functions to inline before they have types, and `with`.
_NOT_NEEDED = ("InlineClosureLikes", "NopythonRewrites", "InlineOverloads", "InlineInlinables", "WithLift")
_OVERRIDDEN = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals")


class Part(JITCodeLibrary):
    """The code of a function that is never run by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int | None:
        """What a call from Python runs on (closure, arguments, keywords): TypeError, no closure is callable."""
        return ctypes.cast(ctypes.pythonapi.PyObject_Call, ctypes.c_void_p).value

    @property
    def codegen(self) -> Any:
        """Of all that it can do, what is asked of a finished library: to note where in memory its environment lies."""
        return SimpleNamespace(set_env=lambda name, environment: None)


class LeanCompiler(Compiler):
    """Numba's compiler without the passes that look for what no function here has."""

    def define_pipelines(self) -> Any:
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [step for step in pipeline.passes if step[0].__name__ not in _NOT_NEEDED]
        return pipelines


class PartCompiler(LeanCompiler):
    """The same, for a function that becomes a Part."""

    def define_pipelines(self) -> Any:
        if all(hasattr(JITCodeLibrary, name) for name in _OVERRIDDEN):
            self.state.library = Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
            self.state.library.enable_object_caching()
        return super().define_pipelines()
