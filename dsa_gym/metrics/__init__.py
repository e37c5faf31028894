"""Task metrics, from the libraries of the field."""
