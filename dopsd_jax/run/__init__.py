"""Makes what a configuration describes: model, data and step; the work directory of a run.

May import conditioning and everything before it. Shared by all programs.
"""
