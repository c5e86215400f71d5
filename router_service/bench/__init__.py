"""Measurements of the running service: a proxied request's cost, the time to the first token, how well it routes."""
