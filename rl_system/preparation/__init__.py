"""From a folder of photographs to training data (docs/prepare-data.md)."""
