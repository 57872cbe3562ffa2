"""How the site reads the library's docstrings and signatures, which griffe takes from the source without importing it."""

from __future__ import annotations

import griffe


class Docstrings(griffe.Extension):
    """Shows examples as code: griffe's parser knows the section by its plural only."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename the section of one docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")


class OptionDefaults(griffe.Extension):
    """Shows the default of an option instead of the place that defines it: `criterion='reconstruction'`."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Replace the defaults of all functions of the package, once its options are known."""
        for function in functions(pkg):
            for parameter in function.parameters:
                group, _, field = str(parameter.default).rpartition(".")
                if group.endswith("Options"):
                    arguments = pkg["options"][group][field].value.arguments
                    parameter.default = next(each.value for each in arguments if getattr(each, "name", "") == "default")


def functions(thing: griffe.Object) -> list[griffe.Function]:
    """The functions of a module, and of those inside it."""
    if isinstance(thing, griffe.Function):
        return [thing]
    members = (member for member in thing.members.values() if not member.is_alias)
    return [function for member in members if isinstance(member, griffe.Object) for function in functions(member)]
