"""Studies: one model, many recipes, measured with standard errors; see :class:`ptqkit.Study`.

``engine`` runs the cells that are missing, ``cells`` keeps them, ``products`` spells out grids of
options, ``paired`` has differences with standard errors, ``result`` what a study gives.
``ptqkit sweep`` runs on the same engine.
"""
