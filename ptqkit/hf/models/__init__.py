"""See what a transformers model consists of and how it runs."""
