"""What several tests of runs share."""

from run.fake_stages import runs  # noqa: F401
