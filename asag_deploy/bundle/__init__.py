"""Exported bundles: the folder, its manifest, and how the manifest is read and written."""
