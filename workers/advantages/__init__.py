"""Advantage estimators: numpy functions over a closed batch, a file each.

Everything reads the whole batch: whitening, group means and the KL's mean are over all of its rows, so a result
never depends on how the batch is cut later.
"""
