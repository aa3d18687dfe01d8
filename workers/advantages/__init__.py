"""Advantage estimators: numpy functions over a closed batch."""
