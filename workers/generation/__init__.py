"""Generation engines (vLLM, torch) behind one interface, and the roads by which new weights reach them.

The controller decides when a version is published; the training layout belongs to `workers.resharding`.
"""
