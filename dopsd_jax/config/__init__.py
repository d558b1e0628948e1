"""The fields of a configuration, finding and loading one, and the options that programs share.

May import what `methods` may, and `methods`. Imports no JAX: a wrong option is reported at once.
"""
