"""Tracing a forward on proxies that know shapes: see :mod:`fxtemporal.capture.tracing.shape_tracer`."""
