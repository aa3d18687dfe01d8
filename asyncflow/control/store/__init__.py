"""What survives a crash: the ledger of samples, the checkpoints, the store that commits both, and the run's reports.

What to do after a failure is decided in `asyncflow.control.supervision`.
"""
