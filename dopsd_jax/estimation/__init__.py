"""What a step needs on devices that need not be here: memory, FLOP, traffic, and what to change.

May import run and everything before it. Nothing is loaded or allocated.
"""
