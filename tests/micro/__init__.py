"""Micro-benchmarks for the inner loop of development; without ``--benchmark-only`` they are tests of their answers.

Each has a parameter `case`, so that ``--benchmark-group-by=param:case`` puts all that compute the same side by side.
"""
