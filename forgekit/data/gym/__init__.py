"""The gym: procedurally generated, verifiable tasks in ten levels, with a solver that writes its reasoning."""

from forgekit.data.gym.core import FAMILIES, Family, Problem, Trace, generate, solve, split_of

__all__ = ["FAMILIES", "Family", "Problem", "Trace", "generate", "solve", "split_of"]
