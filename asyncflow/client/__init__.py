"""How a program drives a run. Needs only protocols."""
