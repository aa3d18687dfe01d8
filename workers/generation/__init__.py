"""Generation engines (vLLM, torch) behind one interface, and the ways in which new weights reach them.

When a version is published is decided by the controller.
"""
