"""Has jobs on media files done by an Apache Beam pipeline: here, on Flink or Dataflow.

Each job is done by a process of `workers`, as without Beam, so that a file has the same
figures wherever it is measured, and a decoder that crashes costs that file alone.

Results come through files in one folder, which all workers reach: it is beside the
ledger, or in --temp_location where that is given, as Dataflow needs it anyway.

  jobs-ID.jsonl     what a pipeline is to do, a job a line, while somebody waits for it
  done-ID.jsonl     some results, which are taken, and removed, when they are there

So the ledger grows while a pipeline runs. One that is stopped loses the last results of
each worker, `_KEPT` or `_SECONDS` of work. Where the host that started it dies, the
pipeline goes on, and the next one begins with what it has left behind.
"""

import hashlib
import json
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from sora_jax.data.intake import ledger, workers
from sora_jax.data.intake.workers import Job

# Results that a worker keeps before it writes them, and for how long.
_KEPT, _SECONDS = 64, 10.0
_POLL = 1.0  # seconds between looks at the folder
_PLAIN = CompressionTypes.UNCOMPRESSED


def run(
  jobs: Sequence[Job], flags: Sequence[str], folder: pathlib.Path
) -> Iterator[tuple[Job, Job]]:
  """Yields (job, result) as they are done.

  Args:
    jobs: see `workers`, each with a "key" of its own.
    flags: of Beam and its runner, such as ("--runner=DataflowRunner", ...).
    folder: for results, unless the flags name a --temp_location.

  Raises:
    RuntimeError: the pipeline has failed, or its results are not in the folder.
  """
  options = PipelineOptions(list(flags))
  place = _place(options, folder)
  waiting = {job["key"]: job for job in jobs}
  yield from _taken(place, waiting)
  if not waiting:
    return
  path = FileSystems.join(place, f"jobs-{uuid.uuid4().hex}.jsonl")
  _write(path, [json.dumps(job) for job in waiting.values()])
  pipeline = _Running(options, path)
  try:
    while pipeline.is_alive():
      pipeline.join(_POLL)
      yield from _taken(place, waiting)
    yield from _taken(place, waiting)  # what came between the last look and the end
  finally:
    FileSystems.delete([path])  # without it workers have nothing more to do
  if pipeline.error:
    raise pipeline.error
  if waiting:
    raise RuntimeError(
      f"the Beam pipeline has ended, and {len(waiting)} of {len(jobs)} results are not "
      f"in {place}: if its workers do not share that folder, name one that they do, "
      "such as --temp_location=gs://bucket/folder"
    )


class _Running(threading.Thread):
  """A pipeline that runs; `error` is what it has ended with, if it has failed."""

  def __init__(self, options: PipelineOptions, path: str):
    super().__init__(daemon=True)
    self.error: Exception | None = None
    self._options, self._path = options, path
    self.start()

  def run(self):
    try:
      with beam.Pipeline(options=self._options) as pipeline:
        _ = (
          pipeline
          | "Jobs" >> beam.io.ReadFromText(self._path)
          | "To all workers" >> beam.Reshuffle()
          | "Do" >> beam.ParDo(DoJobs(self._path, ledger.version()))
        )
    except Exception as e:
      self.error = e


class DoJobs(beam.DoFn):
  """Does the jobs of a file, given line by line, and writes results beside it."""

  def __init__(self, path: str, version: list[str]):
    """path: of the file; it is there as long as results are wanted.

    version: of what measures, of who waits for the results, see `ledger.version`.
    """
    self._path, self._version = path, version

  def setup(self):
    """Called by Beam once in each worker."""
    if (here := ledger.version()) != self._version:
      raise RuntimeError(
        f"a worker measures by {here} (figures, PyAV, Pillow, HEIF), and who started "
        f"the pipeline by {self._version}: install the same packages on both"
      )
    self._process = workers.Process()

  def start_bundle(self):
    """Called by Beam before some jobs."""
    self._done = []
    self._wanted, self._since = FileSystems.exists(self._path), time.monotonic()

  def process(self, line: str):
    """Does a job, unless nobody waits for it any more."""
    if not self._wanted:
      return
    job = json.loads(line)
    row = {"key": job["key"], "version": self._version, "result": self._process.do(job)}
    self._done.append(json.dumps(row))
    if len(self._done) >= _KEPT or time.monotonic() - self._since > _SECONDS:
      self.finish_bundle()
      self.start_bundle()

  def finish_bundle(self):
    """Called by Beam after some jobs, which it takes for done then."""
    if self._done:
      name = f"done-{uuid.uuid4().hex}.jsonl"
      _write(FileSystems.join(FileSystems.split(self._path)[0], name), self._done)

  def teardown(self):
    """Called by Beam at the end of a worker."""
    self._process.end()


def _place(options, folder) -> str:
  """The folder of results, of this run alone."""
  temporary = options.view_as(GoogleCloudOptions).temp_location
  folder = os.path.abspath(folder)
  if not temporary:
    return folder
  run_of = hashlib.sha256(folder.encode()).hexdigest()[:12]
  return FileSystems.join(temporary, f"sora_jax-{run_of}")


def _taken(place, waiting) -> Iterator[tuple[Job, Job]]:
  """Yields results that somebody waits for, and removes their files.

  Beam may do a job twice, and an earlier pipeline may have begun with other figures.
  """
  (found,) = FileSystems.match([FileSystems.join(place, "done-*.jsonl")])
  for metadata in found.metadata_list:
    with FileSystems.open(metadata.path, compression_type=_PLAIN) as file:
      rows = [json.loads(line) for line in file.read().splitlines()]
    for row in rows:
      if row["version"] == ledger.version() and row["key"] in waiting:
        yield waiting.pop(row["key"]), row["result"]
    FileSystems.delete([metadata.path])


def _write(path, lines) -> None:
  """Writes a file of lines, which has its name when all are in it."""
  partial = f"{path}.tmp"
  with FileSystems.create(partial, compression_type=_PLAIN) as file:
    file.write("".join(line + "\n" for line in lines).encode())
  FileSystems.rename([partial], [path])
