"""The training engine: weights, batches and steps, over Accelerate."""
