"""What is wired: an algorithm function becomes a checked graph of stages and typed channels."""
