"""Generation engines (vLLM, torch) behind one interface, and the transports of new weights to them.

The controller decides when a version is published; the training layout belongs to `workers.resharding`.
"""
