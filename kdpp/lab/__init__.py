"""The lab: train students by the methods of the papers, and compare them fairly.

`kdpp train`, `kdpp evaluate`, `kdpp compare` and `kdpp tune` are its commands, each with a file of
its name. In the order that data flows:

- data, networks: what is learnt, and by what
- settings, methods, trainer: a method is a task and its settings; the trainer runs and saves it
- models: a checkpoint, with how it was made inside, as a denoiser
- sampling: a recipe and seeds become images
- metrics: images become figures, figures of several seeds an estimate
- spec, bench: what is to be measured; the engine of `kdpp evaluate` and `kdpp compare`
- report, pictures: the page, the tables, the grids of images
- looks: what `kdpp tune` measures
- files, processes: writing whole or not at all; several processes
- console, plugins: what commands say; solvers and methods of one's own

Everything heavier than torch is imported when it is used; the extra `lab` installs it.
"""
