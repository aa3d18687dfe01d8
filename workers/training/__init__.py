"""A model with its optimizer: loading, micro-batches, optimizer steps, adapters, checkpoints, offloading.

What needs several ranks belongs to `workers.parallel`; what is specific to a role belongs to `workers.roles`.
"""
