"""One thread a test process: the suite runs as many processes as there are cores."""

import os
import tempfile

import torch

os.environ["FXTEMPORAL_CACHE"] = tempfile.mkdtemp(prefix="fxtemporal-tests-")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
