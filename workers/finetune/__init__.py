"""Supervised training before RL: SFT on demonstrations, reward models from pairs, cost models from safety labels.

The commands that run it are in `asyncflow.run.finetuning`.
"""
