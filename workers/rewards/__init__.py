"""Scores of responses: rules, the sandbox process that runs a user's rule, and the scorers of rewards and costs.

The roles that use them are in `workers.roles`.
"""
