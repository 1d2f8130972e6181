"""Steps of a solve in which columns follow each other, as kernels and as plain torch."""
