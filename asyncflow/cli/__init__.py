"""The command line: the live view, and the commands around a run folder."""
