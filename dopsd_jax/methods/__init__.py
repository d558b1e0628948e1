"""How the student learns: one record for each method (`registry`), its loss, what losses share.

May import `common`, `parallel`, `models`, `weights`, `data`, `adapters`, `dopsd` and `families`.
"""
