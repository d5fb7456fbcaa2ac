"""Models of other packages, in small random configurations: do they go in, and come out right?

``python -m benchmarks zoo`` runs :func:`fxtemporal.optimize` on every one, each in a process of its
own, and prints a table. The packages are those of the extra ``zoo``; a model whose package is not
installed is left out.
"""

from benchmarks.zoo.table import main

__all__ = ["main"]
