"""Data sets and model folders on disk: files, chat templates, pretraining text, tokenizer files.

The controller decides the order in which prompts are used (`asyncflow.control.admission`).
"""
