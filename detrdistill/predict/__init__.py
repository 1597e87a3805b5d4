"""A trained detector at work: on images that nobody annotated, and in whatever runtime it was exported to."""
