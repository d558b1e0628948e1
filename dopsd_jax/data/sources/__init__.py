"""How data sets are laid out on disk: one file for each layout.

A layout says whether a path is laid out its way (*matches*) and gathers the rows it finds (*read*);
`data.rows.LAYOUTS` lists them. May import `common` and the rest of `data`.
"""
