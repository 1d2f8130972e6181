"""Functions on NumPy arrays; papers cited in brackets are listed in :mod:`ptqkit.reference`."""
