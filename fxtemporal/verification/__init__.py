"""Verification: compares a result with the model it came from."""
