"""Nodes for ComfyUI. A file in its ``custom_nodes`` folder with this line brings them in::

    from kdpp.hosts.comfyui import *

They are described once (`kdpp.hosts.comfyui.nodes`), and offered in the schema that the host has:
V3 (``comfy_entrypoint``), or the classic one (``NODE_CLASS_MAPPINGS``).
"""

from importlib.util import find_spec

from kdpp.hosts.comfyui import nodes

if find_spec("comfy_api") and find_spec("comfy_api.latest"):

    async def comfy_entrypoint() -> object:
        """What ComfyUI calls for a pack's nodes."""
        return nodes.extension()

    __all__ = ["comfy_entrypoint"]
else:
    NODE_CLASS_MAPPINGS = {node.id: nodes.classic(node) for node in nodes.NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.title for node in nodes.NODES}
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
