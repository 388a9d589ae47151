"""Exact attention over a sequence sharded over a mesh axis. Start with `attention.py`, then `ring.py`.

.. include:: README.md
"""
