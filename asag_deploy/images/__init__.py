"""Images: reading, sources, drawing and writing."""
