"""A differential fuzzer: random programs and Conv3d networks, each run as it is and optimized.

The generators know PyTorch, the oracle knows what the README promises, and neither knows how
fxtemporal works. ``python -m tests.adversary --help`` says how to run it.
"""
