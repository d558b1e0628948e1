"""What a run shows: metrics, charts, grids of pictures, incidents, the pages.

May import run and everything before it. `run_page` writes a run's page.
"""
