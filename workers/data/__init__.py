"""Data sets and model folders on disk: files, chat templates, pretraining text, tokenizer files.

The order in which prompts are used is the controller's (`asyncflow.control.admission`).
"""
