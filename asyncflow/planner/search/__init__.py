"""The exact search for the best placement, on one or several kinds of devices.

It takes its numbers from `asyncflow.planner.costs` and does not depend on recipes.
"""
