"""The mesh, the placement of arrays on it, and how processes agree.

May import: common.
"""
