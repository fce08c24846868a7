"""RPG: generates the weights of neural networks from collections of trained checkpoints."""

__version__ = "0.2.0"
