"""What knows nothing of models: errors, files, sizes, silence."""
