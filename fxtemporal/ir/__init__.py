"""The program that passes rewrite, and what stands in its graph."""
