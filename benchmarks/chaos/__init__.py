"""What becomes of a toy run when one of its parts is killed: see ``benchmarks/chaos/__main__.py``."""
