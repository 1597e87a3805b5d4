"""Recipes, presets, runs and tables: what is trained, where it is stored, and which table it belongs to."""
