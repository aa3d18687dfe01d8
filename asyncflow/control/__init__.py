"""The controller of a run: admission, training steps, supervision of the services, the ledger and checkpoints."""
