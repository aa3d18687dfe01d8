"""Starts runs: prepares a recipe, lays out the run folder, starts services and controller; also fine-tuning runs.

What a run decides once it is running belongs to `asyncflow.control`.
"""
