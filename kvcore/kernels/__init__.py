"""Compiled loops. The only package that imports numba.

No Python objects, no validation: callers own the checks, and the slow twins are in
``tests/naive.py``. Everything is compiled at import for declared signatures (some ten seconds on
two cores), never cached on disk (replicas start together, and shared cold caches race: numba
#10128), and holds no GIL.
"""
