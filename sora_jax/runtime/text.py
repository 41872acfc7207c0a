"""Numbers as people read them."""


def format_seconds(seconds: float) -> str:
  """'2d03h', '1h05m', '3m20s' or '12s'."""
  seconds = round(seconds)
  for name, size, low, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60),
                                ("m", 60, "s", 1)):  # fmt: skip
    if seconds >= size:
      return f"{seconds // size}{name}{seconds % size // part:02d}{low}"
  return f"{seconds}s"
