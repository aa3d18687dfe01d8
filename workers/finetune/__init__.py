"""Supervised training before RL: demonstrations (SFT), reward models from pairs, cost models from safety labels.

The command that runs it is in `asyncflow.run.finetuning`.
"""
