"""The benchmarks of `asyncflow bench`. Each reports its result next to a bound, and ratios within one run.

Tests of behaviour do not belong here, nor does anything that a run needs.
"""
