"""Which prompts are admitted, when, and how far generation may run ahead of training: pure bookkeeping.

Sending the prompts is the dispatcher's work (`asyncflow.control.prompt_dispatcher`).
"""
