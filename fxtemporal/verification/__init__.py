"""Is the result right: compared with the model it came from."""
