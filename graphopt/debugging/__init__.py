"""What breaks a model, found and made small."""
