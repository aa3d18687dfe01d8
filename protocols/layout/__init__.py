"""How ranks are arranged (p-t-d topologies, generation grouping) and which rank reads which rows.

All of it is pure functions over rank numbers and row counts; tensors and processes do not belong here.
"""
