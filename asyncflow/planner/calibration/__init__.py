"""How fast this machine really is: a recipe's own calls, timed alone and beside each other.

Results are speeds; what follows from them is computed in `asyncflow.planner.costs` and `asyncflow.planner.simulation`.
"""
