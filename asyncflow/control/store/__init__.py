"""What survives a crash: the ledger of samples, checkpoints, and the store that commits both together.

What to do after a failure is decided in `asyncflow.control.supervision`.
"""
