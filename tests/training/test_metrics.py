"""Averages, speed, console line and files of the metrics."""

import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from sora_jax.runtime import text
from sora_jax.training import metrics


@pytest.fixture
def clock(monkeypatch):
  """A clock that only moves when told."""
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  return now


def meter_of(kind="NVIDIA H100 80GB HBM3", state=None):
  return metrics.Meter(
    1000,
    flops_per_step=8e15,
    tokens_per_step=4096,
    devices=8,
    device_kind=kind,
    state=state,
  )


def test_speed_excludes_compilation_evaluation_and_saving(clock):
  meter = meter_of()
  clock[0] += 60  # compilation
  meter.add({"loss": 9.0})
  meter.start(1)
  for loss in (1.0, 2.0):
    meter.waited(0.5)
    clock[0] += 2.0
    meter.add({"loss": loss})
  with meter.pause("evaluate"):
    clock[0] += 36
  row = meter.row(3)
  assert row["loss"] == 4.0  # of all three steps
  assert row["seconds_per_step"] == 2.0
  assert row["data_wait"] == 0.25
  assert row["tokens_per_second"] == 2048
  assert row["tflops_per_device"] == 500
  assert row["mfu"] == pytest.approx(500 / 989)
  assert row["progress"] == 0.003
  assert row["eta_seconds"] == (4 + 36) / 2 * 997
  meter.add({"loss": 5.0})
  assert meter.row(4)["loss"] == 5.0


def test_first_row_of_one_step_has_no_times(clock):
  meter = meter_of()
  meter.add({"loss": 9.0})
  row = meter.row(1)
  assert row.keys() - {"goodput", "goodput/restart"} == {"loss", "progress"}
  assert row["loss"] == 9.0 and row["progress"] == 0.001


def test_state_continues_the_means():
  meter = meter_of()
  meter.add({"loss": 1.0})
  resumed = meter_of(state=json.loads(json.dumps(meter.state())))
  resumed.add({"loss": 2.0})
  assert resumed.row(2)["loss"] == 1.5
  state = meter_of().state()
  assert state["sums"] == {} and state["count"] == 0


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459),
    ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", None),
  ],
)  # fmt: skip
def test_peaks(kind, peak):
  assert metrics.peak_tflops(kind) == peak


def test_console_line():
  row = {"loss": 0.123456, "grad_norm": 2.0, "seconds_per_step": 0.5, "mfu": 0.41,
         "data_wait": 0.02, "eta_seconds": 3900, "progress": 0.25, "goodput": 0.9,
         "goodput/compile": 0.1}  # fmt: skip
  assert metrics.format_row(25, 100, row) == (
    "step 25/100 (25.0%) loss 0.12346 grad_norm 2 | "
    "0.5 s/step, MFU 41.0%, data wait 2.0%, goodput 90.0%, ETA 1h05m"
  )
  seconds = [12, 200, 3900, 183600]
  assert [text.format_seconds(s) for s in seconds] == [
    "12s", "3m20s", "1h05m", "2d03h",
  ]  # fmt: skip


def rows_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def events_of(folder):
  """Summary values by step in the event files: framed protobufs, without their CRCs."""
  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      for value in event.summary.value:
        yield event.step, value


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step in (10, 20, 30):
    writer.scalars(step, {"loss": np.float32(step)})
  writer.scalars(30, {"eval/loss": float("nan")})
  writer.close()
  assert rows_of(tmp_path)[-1] == {"step": 30, "eval/loss": None}
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3')  # cut by a crash
  writer = metrics.Writer(tmp_path, step=20)
  writer.scalars(30, {"loss": 31})
  writer.close()
  assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [
    (10, 10.0), (20, 20.0), (30, 31.0),
  ]  # fmt: skip
  metrics.Writer(tmp_path).close()
  assert rows_of(tmp_path) == []


def test_scalars_images_and_videos_reach_tensorboard(tmp_path):
  video_THWC = np.zeros((5, 8, 12, 3), np.uint8)
  video_THWC[2:, :, :6] = 255
  writer = metrics.Writer(tmp_path)
  writer.scalars(4, {"loss": 0.5})
  writer.images(4, {"frame": video_THWC[2]})
  writer.videos(4, {"sample": video_THWC}, fps=8)
  writer.close()
  values = {value.tag: (step, value) for step, value in events_of(tmp_path)}
  assert values["loss"][0] == 4 and values["loss"][1].simple_value == 0.5
  image = values["frame"][1].image
  assert (image.height, image.width) == (8, 12)
  assert image.encoded_image_string.startswith(b"\x89PNG")
  gif = values["sample"][1].image.encoded_image_string
  assert gif.startswith(b"GIF89a") and gif.count(b"\x21\xf9") >= 2


def test_inactive_writer_writes_nothing(tmp_path):
  writer = metrics.Writer(tmp_path / "none", active=False)
  writer.scalars(1, {"loss": 1.0})
  writer.images(1, {"frame": np.zeros((2, 2, 3), np.uint8)})
  writer.flush()
  writer.close()
  assert not (tmp_path / "none").exists()


def test_a_state_stays_as_it_was_taken():
  """Checkpoints are written by a thread, while the next steps are counted."""
  meter = meter_of()
  meter.start(0)
  meter.add({"loss": 1.0})
  state = meter.state()
  meter.add({"loss": 5.0})
  assert state["sums"] == {"loss": 1.0} and state["count"] == 1


def test_a_full_disk_keeps_the_rows_and_ends_nothing(tmp_path, monkeypatch, caplog):
  writer = metrics.Writer(tmp_path)
  writer.scalars(1, {"loss": 1.0})
  whole, full = writer._file, True

  class Filling:
    """Takes three bytes more, and then none until there is room."""

    def __init__(self):
      self.room = 3

    def write(self, content):
      if full and not self.room:
        raise OSError(28, "No space left on device")
      taken = content[: self.room] if full else content
      self.room -= len(taken)
      return whole.write(taken)

    close = whole.close

  writer._file = Filling()
  events = writer._board.file_writer.event_writer._ev_writer
  monkeypatch.setattr(
    events._py_recordio_writer,
    "write",
    lambda _: (_ for _ in ()).throw(OSError(28, "")),
  )
  # More than fit into TensorBoard's queue, which nobody would empty.
  for step in range(2, 40):
    writer.scalars(step, {"loss": float(step)})
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  full = False
  writer.scalars(40, {"loss": 40.0})
  writer.close()
  assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 41))
  assert len([m for m in caplog.messages if "cannot be written now" in m]) == 1
