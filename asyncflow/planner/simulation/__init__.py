"""Simulate a run in virtual time: the real admission and lease code, with durations in place of models.

The durations come from `asyncflow.planner.calibration` and `asyncflow.planner.costs`.
"""
