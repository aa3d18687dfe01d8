"""Rewards and costs that are computed, not read from a model: rules, user code in a sandbox, and the checks of scores.

Reward and cost models are roles: `workers.roles`.
"""
