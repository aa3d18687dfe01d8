"""Where models should run: a cost model, an exact search, a simulator of the schedule, and calibration.

Nothing below imports it; a run works without it unless it says `placement = "auto"`.
"""
