"""Numbers that data and models must agree on; importable without torch."""

IGNORE = -100
"""Label of positions that are not supervised (the convention of PyTorch's cross-entropy)."""
