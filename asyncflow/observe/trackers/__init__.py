"""Trackers show a run elsewhere: TensorBoard, Weights & Biases, MLflow, trackio, or a class of the user's own.

Each works in a thread of its own behind a bounded queue (`tracking.py`), so that none can stop or slow a run.
"""
