"""What the kit costs: times, ratios and memory, measured; `make benchmark` and `make gpu-check`."""
