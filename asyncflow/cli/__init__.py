"""The `asyncflow` command: its subcommands and what they print. What they do is in the rooms below."""
