"""Services: one per model. Rows arrive in mailboxes, a stage computes, channels send its output on.

The same code runs in Ray actors and in one process. Decisions about the run belong to `asyncflow.control`."""
