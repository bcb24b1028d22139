"""Which backend ``backend="auto"`` means."""

from .rule import choose, lacks

__all__ = ["choose", "lacks"]
