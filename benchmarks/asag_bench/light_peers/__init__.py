"""Light peers: detectors of other kinds on the light network's backbone, trained here for comparison."""
