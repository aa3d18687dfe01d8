"""From a recipe to a running pipeline: the run's folder, the services, the controller; and fine-tuning runs.

Decisions of a running pipeline belong to `asyncflow.control`.
"""
