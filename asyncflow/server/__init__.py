"""The HTTP interface of runs: of one run in its own process, and of a server that starts and finds many.

What runs, and how, belongs to `run`; the values that travel belong to `protocols.control.runs`.
"""
