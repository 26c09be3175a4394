"""What a step would need and take on hardware that is not here: compiled for it, never run."""
