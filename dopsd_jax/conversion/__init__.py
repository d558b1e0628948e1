"""Whole models in and out: import, export, inspection.

Which networks a folder has, its family says. May import: everything up to families.
"""
