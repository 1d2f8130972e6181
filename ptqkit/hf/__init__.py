"""Hugging Face models: quantize, evaluate, save and load.

Importing this package registers the ``ptqkit`` checkpoint format with transformers: a stock
``from_pretrained`` cannot read such a checkpoint otherwise. The names and where they come from are
listed in ``__init__.pyi``; each is imported when first used.
"""

from __future__ import annotations

import lazy_loader

from ptqkit.hf.checkpoint.plugin import register_format

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
del lazy_loader

register_format()
