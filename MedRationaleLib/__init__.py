"""MedRationale: prostate MRI findings with their reasons, in PI-RADS words."""

__version__ = "0.1.0"
