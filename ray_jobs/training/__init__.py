"""What Ray Train needs around the training loop: workers, checkpoints, metrics."""
