"""The lab: train students by the methods of the papers, and compare them fairly.

`kdpp train`, `kdpp evaluate`, `kdpp compare` and `kdpp tune` are its commands, each with a file of
its name. In the order that data flows:

- data, networks, schedules: what is learnt, by what, at which noise levels
- models, weights: a checkpoint as a denoiser, with a card that says how it was made
- diffusion: the formulas that methods of training share
- settings, methods, trainer: a method is a class and its settings; the trainer runs and saves it
- plugins: methods and solvers of one's own
- sampling: a recipe and seeds become images
- metrics: images become figures, figures of several seeds an estimate
- spec, judges, bench: what is to be measured, and in what; the engine of `kdpp evaluate` and
  `kdpp compare`
- report, pictures: the page, the tables, the grids of images
- affordable, asked, looks, tuning, answer: what `kdpp tune` does by default, is asked for and
  measures, how it decides, and what it says
- pieces: work in parts that are kept and shared
- files, processes, console: writing whole or not at all; several processes; what commands say

Everything heavier than torch is imported when it is used; the extra `lab` installs it.
"""
