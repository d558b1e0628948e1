"""Adapters: small trained changes of the linear layers of a frozen network.

May import: common, parallel, models, weights.
"""
