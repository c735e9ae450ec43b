"""Two models against each other: outputs, layer by layer, and by structure."""
