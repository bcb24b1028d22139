"""Measuring: one process per backend, every answer checked, every cell recorded with its reason."""

from .record import SCHEMA_VERSION, STATUSES, Record, append_record, read_records
from .runner import Plan, measure

__all__ = ["SCHEMA_VERSION", "STATUSES", "Plan", "Record", "append_record", "measure", "read_records"]
