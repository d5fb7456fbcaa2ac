"""Tracing a forward on proxies that know shapes: see :mod:`fxtemporal.tracing.shape_tracer`."""
