"""Which prompts are admitted, when, and how far generation may run ahead of training: pure bookkeeping.

`asyncflow.control.generating_service` sends the prompts.
"""
