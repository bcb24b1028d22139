"""Choosing a backend: by estimate or measurement, bounded by accuracy and memory."""

from .auto import choose
from .candidates import lacks
from .problem import Problem

__all__ = ["Problem", "choose", "lacks"]
