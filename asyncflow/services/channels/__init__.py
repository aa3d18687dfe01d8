"""How rows travel between services: mailboxes, joins, outboxes, and references to the shards that ranks encode.

The wire and the object store below are in `asyncflow.services.runtime`.
"""
