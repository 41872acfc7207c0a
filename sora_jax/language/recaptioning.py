"""Captions of all clips of a manifest: what is asked, what is kept, what is written.

A question is known by the content that it is about: the clip's file, its window, the
style, the prompt, the model and its settings. Its answer is kept under that as soon as
it comes. So the same command may be killed and typed again, and clips that are new, or
under another name, are told from those that are not.

Processes share the clips, batch by batch. Each leaves a note when it is done with its
own, and the one that finds the notes of all writes the manifest.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from sora_jax.data import clips as clip_files
from sora_jax.data import stored
from sora_jax.data.clips import Clip, SyntheticCaption
from sora_jax.data.intake.ledger import key_of
from sora_jax.language.kept import Kept, read
from sora_jax.language.styles import Style
from sora_jax.language.writers import Answer, Question, Writer
from sora_jax.runtime import files
from sora_jax.runtime.progress import Progress

FOLDER = "recaption"
# So many questions in a row without an answer, none of which was asked in an earlier
# run: something is wrong with all of them.
MOST_FAILURES = 20


class Share(NamedTuple):
  """Which process of how many this is."""

  process: int = 0
  processes: int = 1


class Summary(NamedTuple):
  """What is in a manifest now.

  Attributes:
    captions: of this model, styles and prompts. failed: questions without an answer.
    tokens: (of questions, of answers) that all of these captions took.
  """

  captions: int
  failed: int
  tokens: tuple[int, int]


def run(
  manifest,
  writer: Writer,
  styles: Sequence[Style],
  share: Share = Share(),  # noqa: B008 (it cannot be changed)
) -> None:
  """Answers this process's share of the questions about a manifest's clips.

  Raises:
    ValueError: the manifest is none or has no clip; the endpoint cannot work; or too
      many questions in a row had no answer.
  """
  manifest = pathlib.Path(manifest)
  clips = _clips(manifest)
  folder = manifest.parent / FOLDER
  note = _note(folder, share.process)
  note.unlink(missing_ok=True)
  batches = _batches(clips, styles, writer.size)[share.process :: share.processes]
  with (
    Kept(folder, "files", share.process) as digests,
    Kept(folder, "answers", share.process) as answers,
    Kept(folder, "failures", share.process) as failures,
  ):
    asking = _Asking(writer, digests, answers, failures)
    # Last, so that they do not keep the others from being asked.
    batches.sort(key=lambda batch: any(map(asking.has_failed, batch)))
    total = sum(map(len, batches))
    with Progress("captioned", total, "captions", share.process) as progress:
      _run_all(asking, batches, progress, writer.threads)
  failed = [list(row) for row in sorted(asking.failed)]
  job = _job(clips, writer, styles, share.processes)
  files.write_json(note, {"job": job, "failed": failed})


def merge(
  manifest,
  writer: Writer,
  styles: Sequence[Style],
  processes: int = 1,
  replace: bool = False,
) -> Summary | None:
  """Writes the captions into the manifest once all processes have made theirs.

  Captions of other models, styles or prompts stay, unless `replace`; those of the
  clips themselves always do. It may be called by several processes at once.

  Returns:
    What is in the manifest; None if a process is not done yet.

  Raises:
    ValueError: there is not one caption.
  """
  manifest = pathlib.Path(manifest)
  clips = _clips(manifest)
  folder = manifest.parent / FOLDER
  job = _job(clips, writer, styles, processes)
  reasons: dict[tuple[str, str], str] = {}
  for process in range(processes):
    note = _read_note(_note(folder, process))
    if note.get("job") != job:
      return None
    reasons |= {(i, style): reason for i, style, reason in note["failed"]}
  answered = list(_answered(clips, writer, styles, folder))
  merged, summary = _merged(clips, answered, writer, replace)
  reasons |= {(c.id, s.name): a.reason for c, s, a in answered}
  failed = [
    {"id": c.id, "style": s.name, "reason": reason}
    for c, s in itertools.product(clips, styles)
    if (reason := reasons.get((c.id, s.name), "another copy of it had no answer"))
  ]
  failed.sort(key=lambda row: (row["id"], row["style"]))
  listed = folder / "failed.jsonl"
  clip_files.write_lines(listed, (json.dumps(r, ensure_ascii=False) for r in failed))
  if not summary.captions:
    raise ValueError(f"not one caption could be made; {listed} says why")
  clip_files.write_manifest(manifest, merged)
  written = {
    "captions": _digest([(clip.id, _rows(clip)) for clip in merged if clip.synthetic]),
    "count": sum(len(clip.synthetic) for clip in merged),
  }
  files.write_json(clip_files.recaption_summary(manifest), written)
  return summary._replace(failed=len(failed))


class _Asking:
  """The state of a run that its threads share."""

  def __init__(self, writer: Writer, digests: Kept, answers: Kept, failures: Kept):
    self.writer, self.digests, self.answers = writer, digests, answers
    self._failures = failures
    self.failed: set[tuple[str, str, str]] = set()
    self._lock = threading.Lock()
    self._open: set[str] = set()  # keys that a thread is asking for now
    self._in_a_row = 0

  def batch(self, questions: Sequence[Question]) -> None:
    """Answers the questions of a batch that are not answered yet."""
    keys = []
    for question in questions:
      try:
        keys.append(key(question, self.writer, self._digest(question.clip)))
      except OSError as error:
        keys.append("")
        self._fail(question, f"cannot be read: {error.strerror}")
    wanted = self._claim(keys)
    if not wanted:
      return
    try:
      # All of them, so that a batch is the same each time.
      for k, question, answer in zip(
        keys, questions, self.writer.answer(questions), strict=True
      ):
        if k in wanted:
          self._take(k, question, answer)
    finally:
      with self._lock:
        self._open -= wanted

  def has_failed(self, question: Question) -> bool:
    """Whether it was ever asked without an answer, and may be rejected for itself."""
    return self._name(question) in self._failures

  def _name(self, question) -> str:
    return f"{self.writer.by} {question.style.name} {question.clip.id}"

  def _claim(self, keys) -> set[str]:
    """Those of the keys that nobody has asked for; copies are asked for once."""
    with self._lock:
      wanted = {k for k in keys if k and k not in self.answers} - self._open
      self._open |= wanted
    return wanted

  def _take(self, k, question, answer: Answer):
    if answer.final:
      self.answers.add(k, [answer.text, answer.reason, list(answer.tokens)])
      with self._lock:
        self._in_a_row = 0
      return
    self._fail(question, answer.reason)
    if not answer.asked:
      return
    if self.has_failed(question):  # in an earlier run: it is no news of the endpoint
      return
    self._failures.add(self._name(question), answer.reason)
    with self._lock:
      self._in_a_row += 1
      if self._in_a_row >= MOST_FAILURES:
        raise ValueError(
          f"{self._in_a_row} questions in a row had no answer, the last because: "
          f"{answer.reason}; what was answered is kept"
        )

  def _fail(self, question, reason):
    with self._lock:
      self.failed.add((question.clip.id, question.style.name, reason))
    logging.log_first_n(
      logging.WARNING, "%s: no %s caption: %s", 10,
      question.clip.id, question.style.name, reason,
    )  # fmt: skip

  def _digest(self, clip: Clip) -> str:
    """Hash of the bytes of a clip's file, once while the file stays as it is."""
    path = pathlib.Path(clip.path)
    known_by = key_of(path, clip.path)
    if known_by not in self.digests:
      self.digests.add(known_by, file_digest(clip.path))
    return self.digests[known_by]


def key(question: Question, writer: Writer, digest: str) -> str:
  """What a question is known by.

  Args:
    question: about a clip.
    writer: who is asked.
    digest: of the clip's file.
  """
  clip, style = question
  window = [clip.start, clip.frames, clip.fps, clip.height, clip.width, clip.crop]
  asked = [style.name, style.prompt, writer.by, writer.settings]
  return _digest([digest, window, asked])


def file_digest(path) -> str:
  """SHA-256 of a medium's bytes. OSError if it cannot be read."""
  opened, digest = stored.opened(path), hashlib.sha256()
  with open(opened, "rb") if isinstance(opened, str) else opened as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


def _clips(manifest) -> list[Clip]:
  clips = clip_files.read_manifest(manifest)
  if not clips:
    raise ValueError(f"{manifest}: it has no clip to caption")
  return clips


def _batches(clips, styles, size) -> list[list[Question]]:
  """Questions of one style that are answered together, in the manifest's order."""
  return [
    [Question(clip, style) for clip in clips[start : start + size]]
    for start in range(0, len(clips), size)
    for style in styles
  ]


def _run_all(asking: _Asking, batches, progress: Progress, threads: int) -> None:
  """Answers batches by threads, a few ahead, so that memory does not grow.

  After an error the others end what they have begun: it is paid for, and kept.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    open_batches: dict[concurrent.futures.Future, int] = {}
    try:
      for batch in batches:
        if len(open_batches) >= 2 * threads:
          _finish(open_batches, progress)
        open_batches[pool.submit(asking.batch, batch)] = len(batch)
      while open_batches:
        _finish(open_batches, progress)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _finish(open_batches, progress):
  """Waits for one batch or more; raises what they raised."""
  first = concurrent.futures.FIRST_COMPLETED
  done, _ = concurrent.futures.wait(open_batches, return_when=first)
  for future in done:
    progress.advance(open_batches.pop(future))
    future.result()


def _answered(clips, writer, styles, folder) -> Iterator[tuple[Clip, Style, Answer]]:
  """Yields all answers that there are, in the manifest's order.

  Tokens are those of the first of several copies: one question was asked for all.
  """
  digests, answers = read(folder, "files"), read(folder, "answers")
  counted: set[str] = set()
  for clip in clips:
    try:
      digest = digests[key_of(pathlib.Path(clip.path), clip.path)]
    except (OSError, KeyError):  # it could not be read, and is listed
      continue
    for style in styles:
      k = key(Question(clip, style), writer, digest)
      if k in answers:
        text, reason, tokens = answers[k]
        paid = (0, 0) if k in counted else tuple(tokens)
        counted.add(k)
        yield clip, style, Answer(text, reason, paid)


def _merged(clips, answered, writer, replace) -> tuple[list[Clip], Summary]:
  """The clips with their captions, and what these are.

  An earlier caption of the same model, style and prompt makes room for a new one, and
  stays where there is none.
  """
  written: dict[str, list[SyntheticCaption]] = {}
  captions, paid = 0, [0, 0]
  for clip, style, answer in answered:
    paid = [a + b for a, b in zip(paid, answer.tokens, strict=True)]
    if answer.text:
      caption = SyntheticCaption(answer.text, style.name, writer.by, style.digest)
      written.setdefault(clip.id, []).append(caption)
      captions += 1
  merged = []
  for clip in clips:
    new = written.get(clip.id, [])
    instead = {(c.by, c.style, c.prompt) for c in new}
    others = [c for c in clip.synthetic if (c.by, c.style, c.prompt) not in instead]
    found = ([] if replace else others) + new
    found.sort(key=lambda c: (c.by, c.style, c.prompt))
    merged.append(dataclasses.replace(clip, synthetic=tuple(found)))
  return merged, Summary(captions, 0, (paid[0], paid[1]))


def _rows(clip) -> list[dict[str, Any]]:
  return [dataclasses.asdict(caption) for caption in clip.synthetic]


def _job(clips, writer, styles, processes) -> str:
  """Tells the runs apart whose notes do not belong together."""
  asked = [[style.name, style.prompt] for style in styles]
  ids = [clip.id for clip in clips]
  return _digest([ids, asked, writer.by, writer.settings, processes])


def _note(folder, process) -> pathlib.Path:
  return folder / f"done-{process:05d}.json"


def _read_note(path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def _digest(values) -> str:
  text = json.dumps(values, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:32]
