"""One run: train, store, find, plan."""
