"""The cost model of a placement: seconds and bytes, from model shapes, workloads and device speeds.

The search over placements is in `asyncflow.planner.search`.
"""
