"""flowpost: replace the MSE regression head of a network by a calibrated posterior."""

__version__ = "0.1.0"
