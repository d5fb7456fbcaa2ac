"""Analyses of a program. None of them changes it."""
