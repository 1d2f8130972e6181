"""What works on any PyTorch module: hooks on linear layers and attention, and their grids.

The names and where they come from are listed in ``__init__.pyi``; each is imported when first used.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
del lazy_loader
