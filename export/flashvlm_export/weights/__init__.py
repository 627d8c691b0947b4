"""Checkpoint tensors to the weights of a bundle."""
