"""RPG: generates the weights of neural networks from collections of trained checkpoints."""

__version__ = "0.1.0"
