"""The version, which the package, its metadata and reports tell."""

__version__ = "0.1.0"
