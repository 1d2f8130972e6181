"""How fast a model runs here, and what memory it takes: float, packed, and by arithmetic."""
