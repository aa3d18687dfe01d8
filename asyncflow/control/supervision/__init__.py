"""Supervision of a run: replaces dead services, detects stalls (wait-for graph, watchdog), decides the outcome.

Decisions are pure functions; starting processes is the runtime's work (`asyncflow.services.runtime`).
"""
