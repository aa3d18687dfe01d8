"""Rewards: rules by name, and the process in which user code runs."""
