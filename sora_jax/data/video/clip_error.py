"""The error of a file that cannot be used."""


class ClipError(ValueError):
  """A media file that cannot be used; `reason` is the message without the path."""

  def __init__(self, path, reason):
    super().__init__(path, reason)  # both in args, so that it pickles
    self.path = str(path)
    self.reason = reason

  def __str__(self):
    return f"{self.path}: {self.reason}"
