"""The client library with which a program drives and follows a run. It starts nothing: `asyncflow.run` does."""
