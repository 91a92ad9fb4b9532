"""From checkpoints to denoisers: real models, as diffusers loads them (extra ``diffusers``).

In the order that data flows:

- headers: the header of a safetensors file, and refusals of what is not one
- architectures: networks and LoRAs, told by the names and shapes of their tensors
- files: what a file or folder on disk is
- presets: which levels, sampler and guidance a published student was made for
- networks: a network of diffusers as a denoiser
- pipelines: a student's and a teacher's pipeline and a prompt, ready to sample
- configs, load: from a path to a pipeline; what single files leave out
- loras: LoRAs for the student, the teacher or both, on one network
- requests: all that a picture depends on, and how a PNG file keeps it
- pairs: a request's student and teacher, loaded
- drawing: the pictures of a request, as files; sheets: pictures side by side
- generate: the command; places: where checkpoints lie

Nothing here opens a pickle or asks the network for a file.
"""
