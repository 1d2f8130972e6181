"""Move range between the layers of a model without changing what it computes."""
