"""The way from a user's job to frames: one direction, a file for each step.

A `job.Job` says what a user wants, in seconds, pixels and files. Its mode is one
function of `modes` (`given_frames.plan` for a model that reads given frames as
channels), which reads the media on a canvas, encodes them in one call and returns a
`conditioning.Timeline`: what is known of the video on the grid of latents. `windows`
cuts a timeline into prompts (`conditioning.Prompt`), each by a pure step from what is
known so far. `batching` plans which prompts share rows, `sample_batch` writes these
rows as training does, `integrate` runs the solver (`diffusion.solvers`) over them,
which asks the `network`, and `sample_batch` takes the latents out again; `denoise`
calls these in turn. The autoencoder makes frames of latents, part by part. Texts
alone, many at once, are `conditioning.Request`s and begin at `batching`.

`pipeline.Sampler` holds the models and calls each step; `files`, for the command, and
`requests`, for the stage, ask it and write. No step calls an earlier one. What comes
back from frames are only inputs of a new way: the image in which two windows meet, and
a preview, which becomes the video of a second job.
"""
