"""Rows and their bytes: column types, messages, sample ids, partitions, the codec and its frames.

`protocols.layout` decides which rank reads which rows.
"""
