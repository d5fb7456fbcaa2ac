"""Lowering of modules to files for other engines. One file per backend, imported when used."""
