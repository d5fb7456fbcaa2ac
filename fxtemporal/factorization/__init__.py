"""(2+1)D factorization: chooses the rank of each Conv3d, and computes its two factors.

:mod:`settings` has the user's settings, :mod:`layers` the layers of a program and their costs,
:mod:`fxtemporal.functional.factors` the algebra, :mod:`moments` the statistics of data, and
:mod:`ranks` the choice of ranks. :mod:`planning` runs all of them.
"""
