"""Thoughts: their format, the strategies they are written in, and the checks that say which of their steps hold."""

from forgekit.data.thoughts.checks import Check, check, conclusion
from forgekit.data.thoughts.form import CLOSE, MARKERS, OPEN, Segment, Thought, parse
from forgekit.data.thoughts.strategies import STRATEGIES, Strategy, strategy_of
from forgekit.data.thoughts.traces import Trace, TraceBook, TraceSource, write_traces

__all__ = [
    "CLOSE",
    "MARKERS",
    "OPEN",
    "STRATEGIES",
    "Check",
    "Segment",
    "Strategy",
    "Thought",
    "Trace",
    "TraceBook",
    "TraceSource",
    "check",
    "conclusion",
    "parse",
    "strategy_of",
    "write_traces",
]
