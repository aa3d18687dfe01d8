"""The 3D-HybridEngine: to the generation layout by one all-gather, and back without communication.

The engines that use the generation layout belong to `workers.generation`.
"""
