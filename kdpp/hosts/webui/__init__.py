"""An extension for the web UIs with Gradio: A1111, Forge, Forge Neo.

- settings: what the panel asks, how infotext writes it
- sampling: a stock sampler's guided form, and kdpp's own samplers
- convention: what differs from host to host; `a1111` and others: each host's
- panel: the script that the host runs: its accordion, its hooks
- pack: what lies in the extension's folder beside the package
"""
