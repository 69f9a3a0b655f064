"""What the engine computes: the definition of each operation, and who computes it."""
