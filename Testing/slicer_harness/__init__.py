"""A stand-in for the Qt half of 3D Slicer over the real slicer-core wheel; README.md says what is real."""
