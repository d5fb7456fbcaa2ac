"""General code without knowledge of models: errors, files, sizes, clock, silence."""
