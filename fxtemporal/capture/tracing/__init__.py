"""Tracing a forward on proxies that know the shapes of what they stand for."""
