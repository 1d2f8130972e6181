"""Other libraries on the models and windows of the comparison, each in its own environment."""
