"""What a configuration means: its model, data and step, and the work directory of a run.

May import conditioning and everything before it. Shared by all programs.
"""
