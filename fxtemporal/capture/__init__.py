"""Capture of a model as a program: a graph whose nodes know their shapes."""
