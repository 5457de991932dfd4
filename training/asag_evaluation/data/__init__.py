"""Data sets: annotations, COCO, CrowdHuman, generated scenes."""
