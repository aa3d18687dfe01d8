"""What runs on each rank of a service: its worker, the rows it reads, and the calls that all ranks enter together.

The coordinator of the ranks is the service itself (`asyncflow.services.service`).
"""
