"""Models lowered to torch.fx, to run and to train them."""
