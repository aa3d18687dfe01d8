"""What services and the controller exchange: messages, layouts of ranks, requests, and the contracts of the roles.

No computation and no I/O belong here. The package needs the standard library, msgspec and numpy only.
"""
