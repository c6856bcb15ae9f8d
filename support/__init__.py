"""Floor 0, what the method stands on: files, weights, text, pictures, the blockwise kernel. Imports packages only."""
