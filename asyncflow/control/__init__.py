"""Who decides: one controller per run, its ledger and its checkpoints."""
