"""Toy photographs, scenes and the scripts that train the shipped toy checkpoints. Run from the repository root."""
