"""odlkit: optimization-derived learning in PyTorch."""
__version__ = "0.1.0"
