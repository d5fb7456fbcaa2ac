"""The program that passes rewrite, and the functions and modules that its graph calls."""
