"""A backend written from docs/spec.md alone, to prove that the text suffices: plain NumPy, a row at a time, no speed.

It shares no code with the other backends. Whatever it cannot do from the text is a fault of the text.
"""

from tests.stages.fourth.pipeline import plan_layers

__all__ = ["plan_layers"]
