"""What the controller asks of services and what services report: requests, notices, events, deliveries.

These messages carry ids, versions and references, never rows. Of a few samples they carry the text, for people.
"""
