"""What a trained detector does with images, as arrays."""
