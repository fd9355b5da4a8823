"""Packages lie in two folders, and Resources joins them as MedRationaleLib._resources; pyproject.toml has the rest."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["MedRationaleLib*"]),
        "MedRationaleLib._resources",
        *find_packages("Training", include=["MedRationaleTraining*"]),
    ]
)
