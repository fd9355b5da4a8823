"""Training of MedRationale's models. Imports MedRationaleLib and is never imported by it."""
