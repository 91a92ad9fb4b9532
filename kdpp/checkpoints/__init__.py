"""From checkpoints to denoisers: real models, as diffusers loads them (extra ``diffusers``).

In the order that data flows:

- files: what a file on disk is, read from its header alone
- presets: which levels, sampler and guidance a published student was made for
- networks: a network of diffusers as a denoiser
- pipelines: a student's and a teacher's pipeline and a prompt, ready to sample

Nothing here opens a pickle or asks the network for a file.
"""
