"""Published checkpoints into our format (docs/import-weights.md).

``source`` reads files and trusts nothing in them, ``chameleon`` and ``llamagen`` say what a checkpoint must hold and
what becomes of it, ``convert`` carries that out shard by shard.
"""
