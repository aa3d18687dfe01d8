"""What is computed: one model at a time, in plain classes.

No Ray, no event loop and no channels: `asyncflow.services` decides when and where a worker runs.
"""
