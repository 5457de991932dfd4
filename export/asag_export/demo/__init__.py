"""`make demo`: from trained checkpoints to detections and figures, on any machine."""
