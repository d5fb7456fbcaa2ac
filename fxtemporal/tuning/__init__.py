"""Tuning: measures what is faster on this machine, and remembers it."""
