"""Pre-training of the small backbones that make everything work offline."""
