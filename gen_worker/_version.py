"""The one place that names the version; the build and the registration read it."""

__version__ = "0.1.0"
