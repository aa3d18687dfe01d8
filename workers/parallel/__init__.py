"""A model that several ranks train: shard plans, schedules, process groups, and the backends 3D, ZeRO and FSDP.

Moving weights from the training layout to a generation layout belongs to `workers.resharding`.
"""
