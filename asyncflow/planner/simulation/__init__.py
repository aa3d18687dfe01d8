"""A pipeline in virtual time: the real admission and lease, with durations instead of models.

Where durations come from is the business of `asyncflow.planner.calibration` and `asyncflow.planner.costs`.
"""
