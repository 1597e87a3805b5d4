"""Data sets in COCO format: the embedded digits, COCO, and a user's own folder."""
