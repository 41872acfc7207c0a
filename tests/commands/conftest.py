"""What several tests of commands share."""

from commands.tiny_weights import imported, pipeline, source  # noqa: F401
