"""The client library with which a program drives and follows a run. It depends only on `protocols`."""
