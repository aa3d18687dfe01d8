"""The 3D-HybridEngine: from the training layout to a generation layout by one all-gather, and back for free.

The engines that use the generation layout belong to `workers.generation`.
"""
