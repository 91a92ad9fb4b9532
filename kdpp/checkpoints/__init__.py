"""From checkpoints to denoisers: real models, as diffusers loads them (extra ``diffusers``).

In the order that data flows:

- headers: the header of a safetensors file, and refusals of what is not one
- architectures: networks and LoRAs, told by the names and shapes of their tensors
- files: what a file or folder on disk is
- presets: which levels, sampler and guidance a published student was made for
- networks: a network of diffusers as a denoiser
- pipelines: a student's and a teacher's pipeline and a prompt, ready to sample

Nothing here opens a pickle or asks the network for a file.
"""
