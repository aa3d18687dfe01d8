"""What a placement costs: seconds, bytes and memory, from shapes, workloads and device speeds.

The search over placements is in `asyncflow.planner.search`.
"""
