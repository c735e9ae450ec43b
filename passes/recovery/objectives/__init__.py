"""What a training is to make small."""
