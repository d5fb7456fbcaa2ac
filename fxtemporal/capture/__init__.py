"""From a model to a program: a graph that knows its shapes."""
