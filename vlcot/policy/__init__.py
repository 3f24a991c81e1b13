"""The decoder: Chameleon's architecture on Llama's implementation."""
