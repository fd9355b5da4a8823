"""What the panel, the console and scripts share: inputs, the worker process, and results in the scene."""
