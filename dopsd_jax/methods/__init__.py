"""How the student learns: one record for each method (`registry`), its loss, what losses share,
and the anchor, which goes with all of them.

May import `common`, `parallel`, `models`, `weights`, `data`, `adapters`, `dopsd` and `families`.
"""
