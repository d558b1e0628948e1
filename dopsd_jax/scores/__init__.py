"""Scores of pictures: what is asked, who judges, and how sure the answer is."""
