"""Pydantic model -> structural schema (KEP-1693), loud about everything that such a schema cannot express.

Pydantic emits JSON Schema 2020-12; the API server takes a small, older dialect. What has an equal is rewritten,
what says nothing to the server (titles, `additionalProperties: false`) is dropped, and the rest is refused with the
field's path and a remedy, because a silently lost constraint is one that users believe in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, JsonSchemaWarningKind, NoDefault
from pydantic_core import core_schema

Schema = dict[str, Any]

VALIDATIONS = "x-kubernetes-validations"
LIST_TYPE = "x-kubernetes-list-type"
LIST_MAP_KEYS = "x-kubernetes-list-map-keys"
INT_OR_STRING = "x-kubernetes-int-or-string"
PRESERVE_UNKNOWN = "x-kubernetes-preserve-unknown-fields"

_ENVELOPE = frozenset({"apiVersion", "kind", "metadata"})
_NULL = {"type": "null"}
_DROPPED = frozenset({"title", "examples", "deprecated", "readOnly", "writeOnly"})
_COPIED = frozenset(
    {"type", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
    | {"required", VALIDATIONS, LIST_TYPE, LIST_MAP_KEYS, INT_OR_STRING, PRESERVE_UNKNOWN}
)
_NUMBERS = frozenset({"minimum", "maximum", "multipleOf"})
# Formats that mean the same to pydantic and to the API server; "duration" for one does not.
_FORMATS = frozenset({"date-time", "date", "uuid", "byte", "int32", "int64", "float", "double"})
_REMEDIES = {
    "oneOf": "one object with every member optional, an enum tag and a CEL rule says the same",
    "allOf": "put the constraints on one model",
    "discriminator": "one object with every member optional, an enum tag and a CEL rule says the same",
    "prefixItems": "name the members of a tuple in a model",
    "patternProperties": "use plain str keys and a Cel rule on the mapping",
    "propertyNames": "use plain str keys and a Cel rule on the mapping",
    "not": "say it as a Cel rule",
}


class NotStructuralError(ValueError):
    """A model says something that no structural schema can carry."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")


class _JsonSchema(GenerateJsonSchema):
    """Pydantic's generator, plus the CEL rules of models, minus its silent losses."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        json_schema = super().model_schema(schema)
        rules = getattr(schema["cls"], "cel_rules", ())
        if rules:
            json_schema[VALIDATIONS] = [rule.to_validation() for rule in rules]
        return json_schema

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        default = super().get_default_value(schema)
        factory = schema.get("default_factory")
        if factory is not None and not schema.get("default_factory_takes_data"):
            default = factory()  # type: ignore[call-arg]  # the guard above is what mypy cannot see
        # Absent and empty mean the same: stored objects stay as short as what users wrote.
        return NoDefault if default in ([], {}, ()) else default

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, BaseModel):
            # Only what differs: `{}` makes the API server apply the defaults of the fields below.
            return dft.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude_none=True)
        return super().encode_default(dft)

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        raise NotStructuralError("$", f"{kind}: {detail}", "use a type that JSON can carry")


def structural_schema(model: type[BaseModel], *, envelope: bool = False) -> Schema:
    """The structural schema of `model`, without defaults and bounds checks below `.status`.

    A default in a status would make the server write what the operator did not, for ever; and only what users
    write must be bounded for the cost estimate of CEL. With `envelope` the fields that every Kubernetes object has
    (apiVersion, kind, metadata) are left out: their schema is not the model's business.
    """
    raw = model.model_json_schema(by_alias=True, schema_generator=_JsonSchema, mode="validation")
    definitions = raw.pop("$defs", {})
    if envelope:
        raw["properties"] = {key: value for key, value in raw["properties"].items() if key not in _ENVELOPE}
    return _Walker(definitions).node(raw, "", ())


class _Walker:
    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def node(self, raw: Schema, path: str, within: tuple[str, ...]) -> Schema:
        raw, within = self._inlined(raw, path, within)
        out: Schema = {}
        for key, value in raw.items():
            if key in _COPIED:
                out[key] = value
            elif key in _NUMBERS:
                out[key] = _bound(key, value, path)
            elif key in _KEYWORDS:
                _KEYWORDS[key](self, out, value, path, within)
            elif key not in _DROPPED:
                remedy = _REMEDIES.get(key, "structural schemas do not know it")
                raise NotStructuralError(path, f"JSON Schema keyword {key!r} cannot be expressed", remedy)
        return _checked(out, path)

    def _inlined(self, raw: Schema, path: str, within: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """Replaces `$ref` and `anyOf [T, null]` by what they stand for; siblings win, validations add up."""
        while True:
            reference = raw.get("$ref")
            branches = [branch for branch in raw.get("anyOf", ()) if branch != _NULL]
            if reference is not None:
                name = reference.removeprefix("#/$defs/")
                if name in within:
                    raise NotStructuralError(path, f"{name} contains itself", "structural schemas must be finite")
                within = (*within, name)
                raw = _merged(self._definitions[name], _without(raw, "$ref"))
            elif len(branches) == 1:
                raw = _merged(branches[0], _without(raw, "anyOf"))
            elif branches and len(branches) < len(raw["anyOf"]):
                raw = {**raw, "anyOf": branches}
            else:
                return raw, within

    def _properties(self, out: Schema, value: Mapping[str, Schema], path: str, within: tuple[str, ...]) -> None:
        out["properties"] = {name: self.node(child, f"{path}.{name}", within) for name, child in value.items()}

    def _items(self, out: Schema, value: Schema, path: str, within: tuple[str, ...]) -> None:
        out["items"] = self.node(value, f"{path}[]", within)
        out.setdefault(LIST_TYPE, "atomic")

    def _additional(self, out: Schema, value: bool | Schema, path: str, within: tuple[str, ...]) -> None:
        # False is extra="forbid": the API server refuses unknown fields itself, and prunes for lenient clients.
        if isinstance(value, dict):
            out["additionalProperties"] = self.node(value, f"{path}{{}}", within)
        elif value:
            out["additionalProperties"] = True  # _checked() wants PreserveUnknown beside it

    def _any_of(self, out: Schema, value: list[Schema], path: str, _within: tuple[str, ...]) -> None:
        if {branch.get("type") for branch in value} != {"integer", "string"}:
            remedy = "IntOrString() is the only union a structural schema knows; else use optional members and Cel"
            raise NotStructuralError(path, "a union of types cannot be expressed", remedy)
        out[INT_OR_STRING] = True
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        for branch in value:  # constraints of one branch say nothing about the other's values
            out.update({key: item for key, item in branch.items() if key not in ("type", "title")})

    def _default(self, out: Schema, value: Any, path: str, _within: tuple[str, ...]) -> None:
        if value is not None and not _in_status(path):
            out["default"] = tidy_number(value)

    def _exclusive(self, bound: str, out: Schema, value: float, path: str) -> None:
        out[bound] = _bound("exclusive" + bound.capitalize(), value, path)
        out["exclusive" + bound.capitalize()] = True

    def _exclusive_minimum(self, out: Schema, value: float, path: str, _within: tuple[str, ...]) -> None:
        self._exclusive("minimum", out, value, path)

    def _exclusive_maximum(self, out: Schema, value: float, path: str, _within: tuple[str, ...]) -> None:
        self._exclusive("maximum", out, value, path)

    def _const(self, out: Schema, value: Any, _path: str, _within: tuple[str, ...]) -> None:
        out["enum"] = [value]

    def _description(self, out: Schema, value: str, _path: str, _within: tuple[str, ...]) -> None:
        out["description"] = " ".join(inspect.cleandoc(value).split())

    def _format(self, out: Schema, value: str, path: str, _within: tuple[str, ...]) -> None:
        if value not in _FORMATS:
            raise NotStructuralError(path, f"format {value!r} means something else to Kubernetes", "use a pattern")
        out["format"] = value

    def _unique_items(self, out: Schema, value: bool, _path: str, _within: tuple[str, ...]) -> None:
        if value:
            out[LIST_TYPE] = "set"


_KEYWORDS: Mapping[str, Callable[[_Walker, Schema, Any, str, tuple[str, ...]], None]] = {
    "properties": _Walker._properties,
    "items": _Walker._items,
    "additionalProperties": _Walker._additional,
    "anyOf": _Walker._any_of,
    "default": _Walker._default,
    "exclusiveMinimum": _Walker._exclusive_minimum,
    "exclusiveMaximum": _Walker._exclusive_maximum,
    "const": _Walker._const,
    "description": _Walker._description,
    "format": _Walker._format,
    "uniqueItems": _Walker._unique_items,
}


def _bound(keyword: str, value: float, path: str) -> int | float:
    """The API server compares whole numbers with the whole part of a bound: 0 is not less than 0.5 to it."""
    same = {"minimum": value < 0, "maximum": value > 0, "multipleOf": True}
    if not float(value).is_integer() and not same.get(keyword, False):
        problem = f"{keyword} {value} is cut to {int(value)} when the API server compares a whole number with it"
        raise NotStructuralError(path, problem, "use a whole bound, an inclusive one further inside, or a Cel rule")
    number: int | float = tidy_number(value)
    return number


def tidy_number(value: Any) -> Any:
    """1.0 -> 1: what the API server stores, so that a differ sees no difference."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _checked(out: Schema, path: str) -> Schema:
    if out.get(PRESERVE_UNKNOWN):
        out.pop("additionalProperties", None)
    elif out.get("additionalProperties") is True:
        raise NotStructuralError(path, "a mapping of anything is pruned by the API server", "add PreserveUnknown()")
    elif "type" not in out and INT_OR_STRING not in out:
        raise NotStructuralError(path, "a value of any type is pruned by the API server", "name its type")
    if LIST_MAP_KEYS in out:
        missing = set(out[LIST_MAP_KEYS]) - set(out["items"].get("required", ()))
        if missing:
            raise NotStructuralError(path, f"list keys {sorted(missing)} are optional", "make them required")
    if not _in_status(path):
        _check_bounded(out, path)
    return out


def _check_bounded(out: Schema, path: str) -> None:
    kind = out.get("type")
    if kind == "string" and not out.keys() & {"enum", "maxLength", "format"}:
        raise NotStructuralError(path, "the string has no bound", "add Field(max_length=...)")
    if kind == "array" and "maxItems" not in out:
        raise NotStructuralError(path, "the list has no bound", "add Field(max_length=...)")
    if "additionalProperties" in out and "maxProperties" not in out:
        raise NotStructuralError(path, "the mapping has no bound", "add Field(max_length=...)")


def _in_status(path: str) -> bool:
    return path == ".status" or path.startswith((".status.", ".status[", ".status{"))


def _without(raw: Schema, key: str) -> Schema:
    return {name: value for name, value in raw.items() if name != key}


def _merged(base: Schema, siblings: Schema) -> Schema:
    merged = {**base, **siblings}
    if VALIDATIONS in base and VALIDATIONS in siblings:
        merged[VALIDATIONS] = [*base[VALIDATIONS], *siblings[VALIDATIONS]]
    return merged
