"""Observation of a run: metrics, journals, the timeline and the report.

It reads events and spans; no decision about a run is made here.
"""
