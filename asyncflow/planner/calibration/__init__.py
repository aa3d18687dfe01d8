"""Measure how fast this machine is: a recipe's own calls, timed alone and concurrently.

The results are speeds; `asyncflow.planner.costs` and `asyncflow.planner.simulation` compute predictions from them.
"""
