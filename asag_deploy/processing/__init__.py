"""Pre- and post-processing: images to network input, network outputs to detections."""
