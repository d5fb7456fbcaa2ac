"""The stages of ``optimize``."""
