"""Files with a checksum inside, changed as a run would have written them."""

import json

from sora_jax.runtime import checksums


def rewrite(path, **values):
  """Sets keys of a sealed JSON object, and seals it again; with its spare copy."""
  content = json.loads(path.read_text()) | values
  content.pop("checksum", None)
  text = json.dumps(checksums.seal(content))
  path.write_text(text)
  spare = path.with_name(f"{path.name}.bak")
  if spare.exists():
    spare.write_text(text)


def delete(path):
  """Deletes a file and its spare copy."""
  path.unlink()
  path.with_name(f"{path.name}.bak").unlink(missing_ok=True)
