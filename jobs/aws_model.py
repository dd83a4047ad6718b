"""A request against botocore's own description of it.

botocore itself checks types and required members only. Names, enumerations, patterns and limits are
in its model all the same, and SageMaker refuses what breaks them minutes later.
"""

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import regex  # the patterns use Java's \p{L}, which `re` lacks

from jobs.request import shown

TYPES = {
    "string": str, "boolean": bool, "integer": int, "long": int, "float": float, "double": float,
    "list": list, "map": dict, "structure": dict,
}  # fmt: skip


@functools.cache
def _input_shape(operation: str) -> Any:
    import botocore.session

    model = botocore.session.get_session().get_service_model("sagemaker")
    return model.operation_model(operation).input_shape


def problems(
    operation: str, request: dict[str, Any], options: Mapping[str, str] | None = None
) -> list[str]:
    """Everything in a request that breaks the model of `operation`.

    Args:
        options: path in the request (`ResourceConfig.InstanceType`) -> the option it comes from,
            which a problem then names.
    """
    return list(_walk(_input_shape(operation), request, "", options or {}))


def _walk(shape: Any, value: Any, path: str, options: Mapping[str, str]) -> Iterator[str]:
    name = options.get(path, path)
    expected = TYPES[shape.type_name]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield f"{name}: a {type(value).__name__}, where AWS wants a {shape.type_name}"
        return
    yield from (f"{name} {problem}" for problem in _broken_limits(shape, value))
    below = f"{path}." if path else ""
    if shape.type_name == "structure":
        for missing in sorted(set(shape.required_members) - value.keys()):
            yield f"{options.get(below + missing, below + missing)}: is missing: give it"
        for key, item in value.items():
            if key not in shape.members:
                unknown = options.get(below + key, below + key)
                yield f"{unknown}: AWS knows no such member{_closest(key, shape.members)}"
            else:
                yield from _walk(shape.members[key], item, below + key, options)
    elif shape.type_name == "map":
        for key, item in value.items():
            yield from _walk(shape.key, key, f"{below}{key}", options)
            yield from _walk(shape.value, item, f"{below}{key}", options)
    elif shape.type_name == "list":
        for item in value:
            yield from _walk(shape.member, item, path, options)


def _broken_limits(shape: Any, value: Any) -> Iterator[str]:
    limits, text = shape.metadata, shown(value)
    if "enum" in limits and value not in limits["enum"]:
        yield f"{text}: AWS knows no such value{_closest(value, limits['enum'])}"
    if "pattern" in limits and not regex.fullmatch(limits["pattern"], value):
        yield f"{text!r}: does not match {limits['pattern']}"
    if shape.type_name in ("structure", "boolean"):
        return
    is_number = shape.type_name in ("integer", "long", "float", "double")
    size, unit = (value, "") if is_number else (len(value), _unit(shape.type_name))
    if "min" in limits and size < limits["min"]:
        yield f"{text}: {size}{unit}, AWS wants at least {limits['min']}"
    if "max" in limits and size > limits["max"]:
        yield f"{text}: {size}{unit}, AWS takes at most {limits['max']}"


def _unit(type_name: str) -> str:
    return " characters" if type_name == "string" else " entries"


def _closest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""
