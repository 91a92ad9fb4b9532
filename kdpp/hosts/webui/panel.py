"""The script that a web UI runs: its accordion, its hooks, infotext and the XYZ plot's axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules import errors, script_callbacks, scripts
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from kdpp.hosts.webui import settings as of
from kdpp.hosts.webui.convention import Convention, here
from kdpp.hosts.webui.sampling import failing, guided, own_samplers
from kdpp.hosts.webui.settings import FIELDS, SAME, Field

__all__ = ["TeacherScript", "begin"]

REFUSED: list[str] = []
"""Samplers that the host did not take."""


class TeacherScript(scripts.Script):  # type: ignore[misc]
    """The panel in both tabs; ``alwayson_scripts["kdpp"]`` of the API."""

    def title(self) -> str:
        return "kdpp"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """A component for each setting, in the settings' order."""
        host = here()
        enabled, *rest = FIELDS
        accordion = InputAccordion(False, label=enabled.label, elem_id=self.elem_id("enabled"))
        with accordion:
            made = [accordion, *(self.component(host, field) for field in rest)]
            for sentence in said(host):
                gr.Markdown(sentence)
        self.infotext_fields = [(one, pasted(field)) for one, field in zip(made, FIELDS)]
        self.paste_field_names = [field.infotext for field in FIELDS if field.infotext]
        return made

    def component(self, host: Convention, field: Field) -> Any:
        """The widget of a setting."""
        shown = {"label": field.label, "value": field.default, "elem_id": self.elem_id(field.name)}
        if field.name == "teacher":
            with gr.Row():
                made = gr.Dropdown(choices=choices(host), **shown)
                create_refresh_button(
                    made, host.refresh, lambda: {"choices": choices(host)},
                    self.elem_id("refresh_teachers"),
                )  # fmt: skip
            return made
        if field.choices:
            return gr.Radio(choices=list(field.choices), info=field.info, **shown)
        if field.low is not None:
            bounds = {"minimum": field.low, "maximum": field.high, "step": field.step}
            return gr.Slider(info=field.info, **bounds, **shown)
        if isinstance(field.default, bool):
            return gr.Checkbox(info=field.info, **shown)
        return gr.Textbox(info=field.info, lines=1, **shown)

    def process(self, p: Any, *args: Any) -> None:
        """Before anything: infotext, and without a teacher its memory."""
        try:
            settings = of.read(p, args)
        except ValueError:  # told where a picture's errors belong, by the hook below
            return
        p.extra_generation_params.update(of.to_infotext(settings))
        if not settings.enabled:
            here().release()

    def process_before_every_sampling(self, p: Any, *args: Any, **_: Any) -> None:
        """Give the sampler of this pass its guided form."""
        host = here()
        try:
            settings = of.read(p, args)
            if settings.apply_to(p):
                p.sampler.func = guided(host, p, settings)
        except Exception as error:
            p.sampler.func = failing(error, p.sampler.func)


def pasted(field: Field) -> Any:
    """How the host reads a setting from an infotext: by its key, or a function of all keys."""
    keys = {field.infotext} if field.infotext else {one.infotext for one in FIELDS} - {""}
    if isinstance(field.default, bool):  # written where it is true
        return lambda params: gr.update(value=not keys.isdisjoint(params))
    return field.infotext


def choices(host: Convention) -> list[str]:
    """What the teacher's checkpoint can be."""
    return [SAME, *host.checkpoints()]


def said(host: Convention) -> list[str]:
    """What the panel says of this host."""
    refused = f"{host.title} did not take these samplers: {', '.join(REFUSED)}." if REFUSED else ""
    return [*filter(None, [*host.cannot, refused])]


def begin() -> None:
    """Register what is registered once: samplers, and the XYZ plot's axes."""
    register(here())
    add_axes()  # the plot without a page asks no later
    script_callbacks.on_before_ui(add_axes)  # a plot that was not there yet
    script_callbacks.on_script_unloaded(end)


def end() -> None:
    """Take everything out again, before the host reads its scripts anew."""
    here().release()
    here().unregister()


def register(host: Convention) -> None:
    """kdpp's own samplers, and a look at whether the host finds them: where it does not, a request
    for one of them silently draws with the host's first sampler."""
    samplers = own_samplers(host)
    try:
        host.register(samplers)
    except Exception:
        errors.report("kdpp: its samplers were not registered", exc_info=True)
    REFUSED[:] = [name for name in samplers if not host.knows(name)]
    if REFUSED:
        errors.report(f"kdpp: {host.title} does not find these samplers: {', '.join(REFUSED)}")


# The XYZ plot -------------------------------------------------------------------------------------


def add_axes() -> None:
    """An axis of the XYZ plot for each setting that it can vary."""
    for script in scripts.scripts_data:
        plot: Any = getattr(script, "module", None)
        if not hasattr(plot, "axis_options") or not hasattr(plot, "AxisOption"):
            continue
        others = [one for one in plot.axis_options if not one.label.startswith(AXIS)]
        plot.axis_options[:] = [*others, *(axis(plot, field) for field in FIELDS)]


AXIS = "[kdpp] "


def axis(plot: Any, field: Field) -> Any:
    """A setting's axis."""
    kind = type(field.default)

    def apply(p: Any, value: Any, _: Any) -> None:
        of.override(p, field.name, str(value).lower() == "true" if kind is bool else value)

    options: dict[str, Callable[[], list[str]]] = {}
    if field.name == "teacher":
        options["choices"] = lambda: choices(here())
    elif kind is bool:
        options["choices"] = lambda: ["true", "false"]
    elif field.choices:
        options["choices"] = lambda: list(field.choices)
    cost = 1.0 if field.name == "teacher" else 0.0
    label = "Teacher" if field.name == "enabled" else field.label
    return plot.AxisOption(AXIS + label, str if kind is bool else kind, apply, cost=cost, **options)
