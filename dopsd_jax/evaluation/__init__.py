"""Scores with intervals: prompts, pictures from the same noise for every model, scorers, tables.

May import reporting and everything before it. A data set's own judge is found by `data_judges`.
"""
