"""Algorithms as dataflow: a traced algorithm function becomes a checked graph of stages and typed channels.

Nothing here runs a stage: services do (`asyncflow.services`).
"""
