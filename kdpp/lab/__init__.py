"""The lab: train students by the methods of the papers, and compare them fairly.

`kdpp train`, `kdpp evaluate`, `kdpp compare` and `kdpp tune` are its commands. Everything heavier
than torch is imported when it is used; the extra `lab` installs it.
"""
