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
- requests, flags: all that a picture depends on, how a PNG file keeps it, how commands ask for it
- pairs: a request's student and teacher, loaded; models: the same, as the lab takes them
- drawing: the pictures of a request, as files; sheets: pictures side by side
- generate: the command; places: where checkpoints lie

The lab's commands (`kdpp.lab.tune`, `kdpp.lab.bench`) stand on this; this stands on the lab's
sampling, settings and files.

Nothing here opens a pickle or asks the network for a file.
"""
