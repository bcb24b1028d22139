"""Measuring: a process for each backend, taking turns; every answer checked, every cell recorded with its reason."""

from .cases import OPS, Case, make_cases
from .journal import Journal
from .runner import Plan, Update, measure

__all__ = ["OPS", "Case", "Journal", "Plan", "Update", "make_cases", "measure"]
