"""What is trained: strict models, presets, the runs of each table. No torch, no disk."""
