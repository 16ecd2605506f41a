"""Compiled loops. The only package that imports numba.

Arrays in, arrays out: no Python objects, no validation; callers own the checks, and every kernel
has a slow twin in ``tests/naive.py``. All are compiled at import for declared signatures, never
cached on disk (replicas start together, and shared cold caches race: numba #10128), and hold no
GIL.
"""
