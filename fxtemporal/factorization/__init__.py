"""(2+1)D factorization: how far to cut each Conv3d, and what its two factors are.

:mod:`settings` is what the user asks for, :mod:`layers` what there is in a program and what it
costs, :mod:`factors` the algebra, :mod:`moments` what is learnt from data, :mod:`ranks` the
decision, and :mod:`planning` puts them in order.
"""
