"""A teacher's help in a pipeline of diffusers: `attach` and `detach`."""

from kdpp.hosts.diffusers.attaching import Attached, attach, detach

__all__ = ["Attached", "attach", "detach"]
