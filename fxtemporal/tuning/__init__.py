"""What is faster on this machine: measured, and remembered."""
