"""A TFDS builder: a data set of MP4 files and captions of a prepared manifest.

  tfds build sora_jax/data/tfds_builder.py --file_format=array_record \
    --manual_dir=runs/x/data

or, in Python, `SoraClips(manifest="runs/x/data/manifest.jsonl", data_dir=...,
file_format="array_record").download_and_prepare()`. An example is a clip at the size
that it is trained at, without loss, so that `data.source = "tfds:sora_clips"` gives the
batches of the manifest it was made of; `crf` 12 or so takes a tenth of the space and
loses little. It needs no TensorFlow, and neither do those who read it; only the command
`tfds` itself imports it.

Clips are encoded one after the other, or by Apache Beam where its options are given:
`tfds build ... --beam_pipeline_options=direct_num_workers=8,...`, or a `beam_runner` or
`beam_options` of `tfds.download.DownloadConfig`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip, read_manifest
from sora_jax.data.video import in_memory, media

_MANIFEST = "manifest.jsonl"
_CRF = 0  # without loss


class SoraClips(tfds.core.GeneratorBasedBuilder):
  """Clips of a prepared manifest, as MP4 files with their captions."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Clips at training size."}
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "The manual folder is workdir/data of a run: `python -m sora_jax.prepare` writes "
    f"{_MANIFEST} there."
  )

  def __init__(self, *, manifest: str = "", crf: int = _CRF, **kwargs):
    """manifest: written by prepare; "" = of the manual folder. crf: of H.264."""
    self._manifest, self._crf = manifest, crf
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      {
        "id": tfds.features.Text(),
        "row": np.int64,  # of the manifest
        "video": tfds.features.Scalar(np.object_),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "frames": np.int64,
        "fps": np.float64,
        "height": np.int64,
        "width": np.int64,
      }
    )
    return tfds.core.DatasetInfo(
      builder=self, description=__doc__, features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    path = pathlib.Path(self._manifest or dl_manager.manual_dir / _MANIFEST)
    clips = list(enumerate(read_manifest(path)))
    splits = sorted({clip.split for _, clip in clips}, reverse=True)
    return {
      split: self._generate_examples([c for c in clips if c[1].split == split])
      for split in splits
    }

  def _generate_splits(self, dl_manager, download_config):
    """As TFDS has it; by Beam where Beam's runner or options are given."""
    self._beam = bool(download_config.beam_runner or download_config.beam_options)
    return super()._generate_splits(dl_manager, download_config)

  def _generate_examples(self, clips: list[tuple[int, Clip]]) -> Any:
    """The examples, or the part of a Beam pipeline that makes them."""
    if not self._beam:
      return (found for row in clips for found in _examples(row, self._crf))
    import apache_beam as beam  # which those who give its options have

    return beam.Create(clips) | beam.Reshuffle() | beam.FlatMap(_examples, self._crf)


def _examples(row: tuple[int, Clip], crf: int) -> Iterator[tuple[int, dict[str, Any]]]:
  """The example of a clip and its row in the manifest; none if it cannot be read."""
  number, clip = row
  try:
    video_THWC = read_clip(clip)
  except media.ClipError as e:
    logging.warning("left out clip %s: %s", clip.id, e)
    return
  example = {
    "id": clip.id,
    "row": number,
    "video": encode(video_THWC, clip.fps, crf),
    "captions": list(clip.captions),
    "frames": clip.frames,
    "fps": clip.fps,
    "height": clip.height,
    "width": clip.width,
  }
  yield number, example


def encode(video_THWC: np.ndarray, fps: float, crf: int = _CRF) -> bytes:
  """An MP4 file of uint8 [T, H, W, 3]: H.264 of RGB, exact with `crf` 0."""
  options = {"crf": str(crf), "preset": "fast", "g": "16"}
  return in_memory.encode(video_THWC, fps, "mp4", "libx264rgb", options)
