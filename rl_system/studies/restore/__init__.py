"""Restoring photographs with a trained policy."""
