"""What is at an address of a bucket or web server: a folder of media, or a manifest."""

import pathlib
import posixpath
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sora_jax.data import remote, text_file
from sora_jax.data.intake import captions, find
from sora_jax.data.intake.captions import MANIFESTS, LeftOut
from sora_jax.data.video import media

_MEDIA = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
_LISTS = (".jsonl", ".parquet")
_NONE: Mapping[str, remote.Member] = {}


class Place(NamedTuple):
  """How remote files are reached.

  folder: of copies. kind: "remote" keeps a copy of each file, "stream" does not.
  """

  folder: pathlib.Path
  kind: str

  def path(self, member: remote.Member) -> str:
    """Path of a remote file, see `stored`."""
    return f"{self.folder}::{self.kind}/{member.text()}"

  def names(self, paths: Iterable[str]) -> dict[str, str]:
    """{path of a remote file: its address without the protocol}, for its id."""
    mark = f"{self.folder}::{self.kind}/"
    found = {}
    for path in paths:
      if path.startswith(mark):
        url = urllib.parse.unquote(path[len(mark) :].split("/")[0])
        protocol, _, name = url.partition("://")
        if protocol.startswith("http"):
          name = urllib.parse.unquote(name.partition("?")[0])
        found[path] = name
    return found

  def copy(self, member: remote.Member) -> pathlib.Path:
    """A copy of a file that is a list, whatever the kind is."""
    return pathlib.Path(remote.local_copy(str(self.folder), member.text()))

  def tars(self, patterns: Iterable[str]) -> dict[str, str]:
    """{path: address} of tar files. ValueError if there are none."""
    found = {}
    for pattern in patterns:
      urls = [pattern]
      if "*" in pattern:
        system = remote.file_system(pattern)
        protocol = pattern.partition("://")[0]
        paths = sorted(system.glob(pattern))
        urls = [p if remote.is_remote(p) else f"{protocol}://{p}" for p in paths]
      for url in urls:
        try:
          found[self.path(remote.member(url))] = url
        except OSError as e:
          raise ValueError(f"{url}: no such tar file ({e})") from e
    if not found:
      raise ValueError(f"{next(iter(patterns))}: no such tar files")
    return found

  def rows(self, url: str, outside: bool):
    """({path: row}, [(path, reason)] of others) of a manifest or a folder.

    Raises:
      ValueError: nothing is there, it cannot be listed, or a manifest is wrong.
    """
    if url.endswith(_LISTS):
      try:
        path = self.copy(remote.member(url))
      except OSError as e:
        raise ValueError(f"{url}: no such manifest ({e})") from e
      root = posixpath.dirname(url)
      return self._manifest(path, root, {}, outside)
    listed = remote.list_files(url)
    files = {name: m for name, m in listed.items() if isinstance(m, remote.Member)}
    unread = [(f"{url}/{name}", f"cannot be read ({e})")
              for name, e in listed.items() if isinstance(e, OSError)]  # fmt: skip
    manifests = [name for name in MANIFESTS if name in files]
    if len(manifests) > 1:
      raise ValueError(f"{url}: {' and '.join(manifests)}; which one is meant?")
    root = url.rstrip("/")
    if not manifests:
      rows, left_out = self._folder(files, root)
      return rows, unread + left_out
    rows, left_out = self._manifest(
      self.copy(files[manifests[0]]), root, files, outside
    )
    for name, member in sorted(files.items()):
      if name not in manifests and self.path(member) not in rows:
        left_out.append((member.url, "not in the manifest"))
    return rows, unread + left_out

  def _manifest(self, path, root, files, outside):
    rows, left_out = captions.read_manifest(path, _address(root, outside), root)
    rows, others = self.resolved(rows, {m.url: m for m in files.values()})
    return rows, left_out + others

  def resolved(
    self, rows: dict[str, dict[str, Any]], known: Mapping[str, remote.Member] = _NONE
  ) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Rows by path in place of those by address, and (address, reason) of others.

    known: files by address; others are asked for, all at once, since each question is
      a wait for a server.
    """
    unknown = [name for name in rows if remote.is_remote(name) and name not in known]
    found = {**known, **dict(zip(unknown, remote.members(unknown), strict=True))}
    kept, left_out = {}, []
    for name, row in rows.items():
      member = found.get(name)
      if member is None:
        kept[name] = row
      elif isinstance(member, OSError):
        left_out.append((name, f"cannot be read ({member})"))
      else:
        kept[self.path(member)] = row
    return kept, left_out

  def _folder(self, files, root):
    rows: dict[str, dict[str, Any]] = {}
    left_out, taken = [], set()
    for name, member in sorted(files.items()):
      suffix = posixpath.splitext(name)[1].lower()
      hidden = any(part.startswith(".") for part in name.split("/"))
      if suffix == ".txt" and not hidden:
        continue
      reason = "a hidden file" if hidden else find.name_fault(name)
      if suffix not in _MEDIA and not reason:
        reason = f"not a video or an image: {suffix or 'no suffix'}"
      text = files.get(posixpath.splitext(name)[0] + ".txt")
      if not reason:
        try:
          texts = text_file.read_lines(self.copy(text)) if text else []
          rows[self.path(member)] = {"captions": texts}
        except (OSError, ValueError) as e:
          reason = f"its captions cannot be used: {e}"
        taken.add(text and text.url)
      if reason:
        left_out.append((member.url, reason))
    for name, member in files.items():
      if name.lower().endswith(".txt") and member.url not in taken:
        left_out.append((member.url, "captions of no file beside it"))
    if not rows:
      raise ValueError(
        f"{root}: none of {len(files)} files there can be used; looked for "
        f"{' '.join(_MEDIA)}, manifest.jsonl and manifest.parquet"
      )
    return rows, left_out


def _address(root: str, outside: bool) -> Callable[[str, str], str]:
  """`locate` that gives addresses of files."""

  def locate(name, where):
    if fault := find.name_fault(name):
      raise LeftOut(f"{where}: {fault}")
    if remote.is_remote(name):
      protocol, _, rest = name.partition("://")
      url = f"{protocol}://{posixpath.normpath(rest)}" if ".." in rest else name
    else:
      protocol, _, rest = root.partition("://")
      path = urllib.parse.quote(name) if protocol.startswith("http") else name
      url = f"{protocol}://{posixpath.normpath(posixpath.join(rest, path))}"
    if not outside and not url.startswith(root + "/"):
      raise ValueError(
        f"{where}: {name} is outside of {root}; config.data.allow_outside=True takes it"
      )
    return url

  return locate


def or_remote(
  locate: Callable[[str, str], str], outside: bool
) -> Callable[[str, str], str]:
  """`locate` of a manifest on this disk, whose rows may be addresses, too.

  They are outside of its folder, so that `outside` must allow them; see `resolved`.
  """
  address = _address("", outside)

  def either(name, where):
    if not remote.is_remote(name):
      return locate(name, where)
    if not outside:
      raise ValueError(
        f"{where}: {name} is outside of the manifest's folder; "
        "config.data.allow_outside=True takes it"
      )
    return address(name, where)

  return either
