"""Parallel: the mesh, what lies where on it, and how many processes agree.

May import: common.
"""
