"""The `asyncflow` command: its subcommands and what they print. The work itself is done by the other packages."""
