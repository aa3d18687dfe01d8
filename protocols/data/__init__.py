"""Rows and their bytes: column types, messages, sample ids, the codec and its frames.

Which rank reads which rows is decided in `protocols.layout`.
"""
