"""What `generate()` promises, served by the engine: preparation, fallbacks, results."""
