"""Averages and speed of the train steps; metrics.jsonl, TensorBoard and the console."""

import contextlib
import io
import json
import math
import pathlib
import threading
import time
from collections.abc import Callable

import numpy as np
import tensorboardX
from absl import logging
from PIL import Image
from tensorboardX.proto import summary_pb2

from sora_jax.runtime import files
from sora_jax.runtime.text import format_seconds
from sora_jax.training import goodput

# Dense bfloat16 TFLOP/s of one JAX device, by the start of its device_kind.
PEAK_TFLOPS = {
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5e": 197.0,
  "TPU v5": 459.0,  # v5p
  "TPU v6 lite": 918.0,
  "TPU v6e": 918.0,
  "TPU7x": 1153.5,  # half a chip: each of its two chiplets is a device
  "NVIDIA H100 PCIe": 756.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "NVIDIA B200": 2250.0,
  "NVIDIA A100": 312.0,
}


def peak_tflops(device_kind: str) -> float | None:
  """Dense bfloat16 peak of a device, TFLOP/s; None where it is not known."""
  names = [name for name in PEAK_TFLOPS if device_kind.startswith(name)]
  return PEAK_TFLOPS[max(names, key=len)] if names else None


class Meter:
  """Means of the metrics and the speed between two log rows.

  The clock starts with `start`, after the step that compiles. Times are seconds,
  flops_per_step and tokens_per_step count all devices. alive: time.time() at which the
  run was last seen at work before, for its goodput.
  """

  def __init__(
    self,
    steps,
    *,
    flops_per_step,
    tokens_per_step,
    devices,
    device_kind,
    state: dict | None = None,
    alive: float = 0.0,
  ):
    self._steps = steps
    self._tflops = flops_per_step / devices / 1e12
    self._tokens = tokens_per_step
    self._peak = peak_tflops(device_kind)
    state = state or {"sums": {}, "count": 0}
    self._goodput = goodput.Goodput(state.get("goodput"), alive)
    self._sums, self._count = dict(state["sums"]), state["count"]
    self._skipped = state.get("skipped", 0)
    # (time, step) when the clock started.
    self._run: tuple[float, int] | None = None
    self._reset(timed=False)

  def _reset(self, timed=True):
    self._since, self._timed = time.perf_counter(), timed
    self._timed_steps, self._paused, self._data = 0, 0.0, 0.0

  def compile(self) -> None:
    """The first step begins."""
    self._goodput.become("compile")

  def start(self, step: int) -> None:
    """Starts the clock: step is finished, and no other is under way."""
    self._goodput.become("train")
    self._run = (time.perf_counter(), step)
    self._reset()

  def add(self, metrics: dict[str, float]) -> None:
    """Counts a finished step; "x:weight", where it is there, weighs "x" in the mean."""
    for name, value in metrics.items():
      weight = float(metrics.get(f"{name}:weight", 1.0))
      self._sums[name] = self._sums.get(name, 0.0) + weight * float(value)
    self._count += 1
    self._timed_steps += 1

  def skip(self) -> None:
    """Counts a step whose update was left out: its metrics are in no mean."""
    self._skipped += 1
    self._timed_steps += 1

  def waited(self, seconds: float) -> None:
    """Counts time spent in next() of the data iterator."""
    self._data += seconds
    self._goodput.spent("data", seconds)

  @contextlib.contextmanager
  def pause(self, cause: str):
    """Time inside ("evaluate", "checkpoint") is no step time; it counts for the ETA."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    self._paused += seconds
    self._goodput.spent(cause, seconds)

  def state(self) -> dict:
    """JSON-able sums since the last row, so that a resumed run writes the same row.

    And the time of the run until now, by cause.
    """
    # A copy: it is written by a thread, while the next step adds to the sums.
    sums = {"sums": dict(self._sums), "count": self._count}
    if self._skipped:
      sums["skipped"] = self._skipped
    return {**sums, "goodput": self._goodput.state()}

  def summary(self) -> str:
    """Where the time of the run went until now, across its restarts: a line."""
    seconds = self._goodput.seconds()
    shares = self._goodput.shares()
    parts = [f"{k.split('/')[1]} {v:.1%}" for k, v in shares.items() if "/" in k and v]
    total = format_seconds(sum(seconds.values()))
    return f"{shares['goodput']:.1%} of {total} went to training; " + ", ".join(parts)

  def row(self, step: int) -> dict[str, float]:
    """Means and speed since the last row; begins a new one.

    skipped, where there were any, is how many updates were left out.
    tokens_per_second and tflops_per_device need their counts, mfu (share of the peak)
    a known device; the first row has no times if it holds only the compiling step.
    """
    row = {}
    for name, value in self._sums.items():
      weight = self._sums.get(f"{name}:weight", self._count)
      if weight and not name.endswith(":weight"):
        row[name] = value / weight
    if self._skipped:
      row["skipped"] = self._skipped
    now = time.perf_counter()
    if self._timed and self._timed_steps:
      elapsed = max(now - self._since - self._paused, 1e-9)
      seconds = elapsed / self._timed_steps
      row["seconds_per_step"] = seconds
      row["data_wait"] = min(self._data / elapsed, 1.0)
      if self._tokens:
        row["tokens_per_second"] = self._tokens / seconds
      if self._tflops:
        row["tflops_per_device"] = self._tflops / seconds
        if self._peak:
          row["mfu"] = row["tflops_per_device"] / self._peak
      assert self._run is not None, "timed steps come after a start"
      begin, first = self._run
      row["eta_seconds"] = (now - begin) / (step - first) * (self._steps - step)
    shares = self._goodput.shares()
    row |= {name: v for name, v in shares.items() if v or name == "goodput"}
    row["progress"] = step / self._steps
    self._sums, self._count, self._skipped = {}, 0, 0
    self._reset(timed=self._run is not None)
    return row


def format_row(step: int, steps: int, row: dict[str, float]) -> str:
  """One console line for a row of `Meter`."""
  row = {name: value for name, value in row.items() if not name.startswith("goodput/")}
  parts = [f"step {step}/{steps} ({row.pop('progress'):.1%})"]
  if "loss" in row:
    parts.append(f"loss {row.pop('loss'):.5g}")
  shown = {
    "seconds_per_step": "{:.4g} s/step",
    "tokens_per_second": "{:.4g} tokens/s",
    "tflops_per_device": "{:.4g} TFLOP/s/device",
    "mfu": "MFU {:.1%}",
    "data_wait": "data wait {:.1%}",
    "goodput": "goodput {:.1%}",
  }
  times = [text.format(row.pop(key)) for key, text in shown.items() if key in row]
  if "eta_seconds" in row:
    times.append(f"ETA {format_seconds(row.pop('eta_seconds'))}")
  parts += [f"{name} {value:.4g}" for name, value in row.items()]
  return " ".join(parts) + (" | " + ", ".join(times) if times else "")


class Writer:
  """Appends to folder/metrics.jsonl and folder/tensorboard; silent where not active.

  A disk that is full, or fails, ends no training: that is said once, rows wait for
  room, and what TensorBoard would show of that time is lost.

  step: the step the run starts from; later rows of a run that was cut are dropped.
  """

  def __init__(self, folder, step: int = 0, active: bool = True):
    self._file: io.FileIO | None = None
    self._waiting, self._warned = b"", False
    self._warning = threading.Lock()
    self._board: tensorboardX.SummaryWriter | None = None
    if not active:
      return
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    if path.exists():
      _truncate(path, step)
    self._file = io.FileIO(path, "a")
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=step + 1 if step else None
    )
    # Its thread would die of an error, and all that wait for it would wait for ever.
    events = self._board.file_writer.event_writer._ev_writer
    for name in ("write_event", "flush"):
      setattr(events, name, self._or_warn(getattr(events, name)))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes one row {"step": step, **values}; non-finite numbers become null."""
    if not self._file or not self._board:
      return
    values = {name: float(value) for name, value in values.items()}
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._waiting += json.dumps({"step": step, **row}).encode() + b"\n"
    self._or_warn(self._write_waiting)()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def images(self, step: int, images: dict[str, np.ndarray]) -> None:
    """Writes named uint8 images [H, W, 3] to TensorBoard."""
    for name, image_HWC in images.items():
      self._pictures(step, name, image_HWC[None], "PNG")

  def videos(self, step: int, videos: dict[str, np.ndarray], fps: float) -> None:
    """Writes named uint8 videos [T, H, W, 3] to TensorBoard, as GIFs that it plays."""
    for name, video_THWC in videos.items():
      self._pictures(step, name, video_THWC, "GIF", duration=1000 / fps)

  def _pictures(self, step, name, video_THWC, form, **options):
    if not self._board:
      return
    frames = [Image.fromarray(np.asarray(frame, np.uint8)) for frame in video_THWC]
    if form == "GIF":
      options |= {"save_all": True, "append_images": frames[1:], "loop": 0}
    buffer = io.BytesIO()
    frames[0].save(buffer, form, **options)
    # Not add_video: it needs moviepy, and with it ffmpeg, to write a GIF.
    image = summary_pb2.Summary.Image(
      width=frames[0].width,
      height=frames[0].height,
      colorspace=3,
      encoded_image_string=buffer.getvalue(),
    )
    value = summary_pb2.Summary.Value(tag=name, image=image)
    self._board.file_writer.add_summary(summary_pb2.Summary(value=[value]), step)

  def _write_waiting(self) -> None:
    """Writes the rows that wait; on a disk that becomes full a part of them."""
    while self._waiting and self._file:
      self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]

  def _or_warn(self, write: Callable) -> Callable:
    """The function, with a warning in place of an OSError, the first time."""

    def wrapped(*args):
      try:
        return write(*args)
      except OSError as error:
        with self._warning:  # TensorBoard's thread may fail at the same moment
          first, self._warned = not self._warned, True
        if first:
          logging.warning("the log cannot be written now, training goes on: %s", error)

    return wrapped

  def flush(self) -> None:
    if self._board:
      self._board.flush()

  def close(self) -> None:
    if self._file and self._board:
      self._or_warn(self._write_waiting)()
      self._file.close()
      self._or_warn(self._board.close)()


def _truncate(path: pathlib.Path, step: int) -> None:
  """Keeps the rows up to step; a row cut short by a crash is dropped with the rest."""
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError, TypeError):
      logging.warning("%s: dropped a broken row: %.80s", path, line)
  files.write_text(path, "".join(kept))
