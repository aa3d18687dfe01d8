"""The exact search for the best placement, on one or several kinds of devices.

It asks `asyncflow.planner.costs` for numbers and knows no recipe.
"""
