"""The way from a user's job to frames: one direction, one step a file.

A `job.Job` says what a user wants, in seconds, pixels and files. Its mode is one
function of `modes`, which reads the media on a canvas, encodes them in one call and
returns a `conditioning.Timeline`: what is known of the video on the grid of latents.
`windows` cuts a timeline into prompts (`conditioning.Prompt`), each by a pure step from
what is known so far. `batching` writes prompts into packed rows, as training does;
`denoise` runs a solver over those rows and takes the latents apart again; the
autoencoder turns latents into frames, part by part, and `files` writes them. Nothing
goes back: the one thing that a later window takes from frames is the image that it
begins with, which `pipeline.Sampler`, who holds the models, passes to the next step.
"""
