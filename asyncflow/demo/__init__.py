"""The demonstration: a task whose three steps of RLHF fit into minutes on two cores."""
