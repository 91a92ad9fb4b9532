"""kdpp inside other programs: one folder for each host.

A host's own modules are imported by its folder alone, and only inside the host.
"""
