"""Choose where models run: a cost model, an exact search, a simulator of the schedule, and calibration.

No lower package imports this one; a run needs it only for `placement = "auto"`.
"""
