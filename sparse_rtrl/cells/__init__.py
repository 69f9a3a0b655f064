"""Ready-made slot cells."""
