"""The tasks, data and models on which `asyncflow demo` runs all three steps of RLHF.

Nothing else imports this package.
"""
