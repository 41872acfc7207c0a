"""How good a captioner is, and what it says of samples: retrieval, similarity, words.

Retrieval R@1: whether of all captions a clip's own is the most similar to it, and the
other way round. Of generated clips the words are judged, too, attribute by attribute,
by `caption_attributes`, which reads nothing but the text.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.video import reader
from sora_jax.encoders.captioner import Captioner, VideoClip
from sora_jax.evaluation import caption_attributes, heldout
from sora_jax.evaluation.attributes import shares_of
from sora_jax.evaluation.shares import Share, share_of
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files
from sora_jax.runtime.progress import track
from sora_jax.runtime.stopwatch import Stopwatch
from sora_jax.runtime.text import table_lines

_AT_ONCE = 256  # clips whose pixels are in memory
_SHOWN = 8


def run(recipe: recipes.Recipe, checkpoint, workdir) -> None:
  """Writes workdir/evaluate/captioner.json and logs it: a captioner on held-out clips.

  Args:
    recipe: says how many of the run's clips (config.evaluate), and of which split.
    checkpoint: folder of the captioner, see `Captioner.from_checkpoint`.
    workdir: of the run, with the stage "data".

  Raises:
    ValueError: if there is no captioner, or no clip with a caption.
  """
  workdir = pathlib.Path(workdir)
  clips = [clip for clip in heldout.heldout_clips(recipe, workdir) if clip.captions]
  if not clips:
    raise ValueError(f"{workdir}: no {recipe.evaluate.split} clip has a caption")
  model = Captioner.from_checkpoint(checkpoint, dtype=recipe.dtype)
  results = measure(model, clips)
  folder = workdir / "evaluate"
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "captioner.json", {"model": model.meta.id, **results})
  for line in lines(results):
    logging.info("%s", line)
  logging.info("results are in %s", folder / "captioner.json")


def measure(model: Captioner, clips: Sequence[Clip]) -> dict:
  """What a captioner says of clips with captions, and how well it finds those.

  Returns:
    "retrieval": see `retrieval`; "similarity": the mean of the clips and their longest
    captions; "captions": of the first clips, their own and the model's in each style;
    "seconds_a_caption"; and where all clips have a truth, "attributes": style -> name
    -> share. All of what `shares_of` gives, as dicts.
  """
  styles = [style for style in model.meta.styles if style != "any"] or ["any"]
  said: dict[str, list[str]] = {style: [] for style in styles}
  embeddings, seconds = [], 0.0
  for start in track(range(0, len(clips), _AT_ONCE), "captioned", "parts"):
    videos = [VideoClip(read_clip(c), c.fps) for c in clips[start : start + _AT_ONCE]]
    embeddings.append(model.embed_clips(videos))
    for style in styles:
      with Stopwatch() as watch:
        said[style] += model.caption(videos, style)
      seconds += watch.seconds
  longest = [max(clip.captions, key=len) for clip in clips]
  clip_NE, text_NE = np.concatenate(embeddings), model.embed_captions(longest)
  results = {
    "clips": len(clips),
    "retrieval": _as_dicts(retrieval(clip_NE, text_NE, longest)),
    "similarity": float(np.mean(np.sum(clip_NE * text_NE, axis=-1))),
    "seconds_a_caption": seconds / (len(clips) * len(styles)),
    "captions": [
      {"id": c.id, "own": list(c.captions), **{s: said[s][i] for s in styles}}
      for i, c in enumerate(clips[:_SHOWN])
    ],
  }
  if all(clip.truth for clip in clips):
    results["attributes"] = {
      style: _as_dicts(attributes_said(said[style], clips, style)) for style in styles
    }
  return results


def attributes_said(
  captions: Sequence[str], clips: Sequence[Clip], style: str
) -> dict[str, Share]:
  """The share of captions in which each attribute is right; of short ones those said.

  Short captions of generated clips say no background.
  """
  scores = [
    caption_attributes.score(caption, clip.truth or {})
    for caption, clip in zip(captions, clips, strict=True)
  ]
  unsaid = ("background", "all") if style == "short" else ()
  return shares_of({k: v for k, v in s.items() if k not in unsaid} for s in scores)


def retrieval(
  clip_NE: np.ndarray, text_NE: np.ndarray, captions: Sequence[str]
) -> dict[str, Share]:
  """R@1 of N clips and their captions, both ways.

  Clips with equal captions are right for each other's.

  Args:
    clip_NE, text_NE: embeddings of length 1.
    captions: what the second are of.

  Returns:
    "clip_to_caption" and "caption_to_clip".
  """
  similarity_NN = clip_NE @ text_NE.T
  text_N = np.array(captions)
  return {
    "clip_to_caption": share_of(text_N[similarity_NN.argmax(1)] == text_N),
    "caption_to_clip": share_of(text_N[similarity_NN.argmax(0)] == text_N),
  }


def similarity_of_samples(
  model: Captioner, paths: Sequence[pathlib.Path], prompts: Sequence[Clip], seeds: int
) -> dict[str, float]:
  """How well samples go with their prompts, and real clips with the same captions.

  Args:
    model: the captioner.
    paths: files of the samples, of all prompts, `seeds` times.
    prompts: the clips whose first captions were sampled; those with a file are read.
    seeds: samples of each prompt.

  Returns:
    "samples": the mean cosine; "real", where prompts have files: that of the clips;
    "n" and "real_n": how many they are.
  """
  captions = [clip.captions[0] for clip in prompts] * seeds
  rates = [clip.fps for clip in prompts] * seeds
  known = [clip for clip in prompts if clip.path]
  parts = {
    "samples": (
      lambda i: VideoClip(reader.read(paths[i]), rates[i]),
      captions,
    ),
    "real": (
      lambda i: VideoClip(read_clip(known[i]), known[i].fps),
      [clip.captions[0] for clip in known],
    ),
  }
  found: dict[str, float] = {}
  for name, (read, texts) in parts.items():
    values = [
      value
      for start in range(0, len(texts), _AT_ONCE)
      for value in _similarities(model, read, texts, start)
    ]
    if values:
      found[name] = float(np.mean(values))
      found["n" if name == "samples" else "real_n"] = len(values)
  return found


def _similarities(model, read, texts, start):
  part = range(start, min(start + _AT_ONCE, len(texts)))
  return model.similarity([read(i) for i in part], [texts[i] for i in part]).tolist()


def _as_dicts(shares):
  return {name: share._asdict() for name, share in shares.items()}


def lines(results: dict) -> list[str]:
  """The lines of a table of what `measure` returns."""
  rows = [
    [f"{style}: {name}", *_cells(share)]
    for style, shares in results.get("attributes", {}).items()
    for name, share in shares.items()
  ]
  rows += [[f"R@1 {name}", *_cells(s)] for name, s in results["retrieval"].items()]
  shown = [
    f"{row['own']} -> {[v for k, v in row.items() if k not in ('id', 'own')]}"
    for row in results["captions"]
  ]
  return [
    *shown,
    *table_lines(["right", "share", "95 %", "n"], rows),
    f"similarity {results['similarity']:.3f}, "
    f"{results['seconds_a_caption']:.3f} s a caption",
  ]


def _cells(share):
  interval = f"{share['low']:.1%}-{share['high']:.1%}"
  return [f"{share['value']:.1%}", interval, str(share["n"])]
