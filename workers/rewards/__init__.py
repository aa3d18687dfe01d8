"""Scores of responses: rules, the sandbox processes that run them, and the scorers of rewards and costs.

The roles that use them are in `workers.roles`.
"""
