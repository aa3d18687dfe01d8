"""A small task, its data and its models: what `asyncflow demo` runs all three steps of RLHF on."""
