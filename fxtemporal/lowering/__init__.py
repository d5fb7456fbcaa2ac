"""What an optimized module is written to. One file a backend, imported only when asked for."""
