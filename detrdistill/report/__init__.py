"""Records as tables, claims, figures and a page."""
