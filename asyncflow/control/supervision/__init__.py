"""What happens when a service dies or nothing moves: replacement, the wait-for graph, the watchdog, the run's outcome.

Decisions are pure functions; starting processes is the runtime's work (`asyncflow.services.runtime`).
"""
