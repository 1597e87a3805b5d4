"""What one detector has before another, and what it costs."""
