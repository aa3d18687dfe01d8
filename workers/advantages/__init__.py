"""Advantage estimators: numpy functions over a closed batch, one file each.

Whitening, group means and the mean KL are taken over the whole batch, so a result never depends on how the batch is
cut over ranks or micro-batches later. Policy losses are in `workers.losses`.
"""
