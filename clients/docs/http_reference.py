"""The HTTP reference, made of the app's own OpenAPI schema; no engine starts for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clients.docs.markdown_tables import table
from server.app import create_app
from server.settings import Settings

_SCHEMAS = "#/components/schemas/"
_TAGS = {"openai": "OpenAI's API"}

Schema = Mapping[str, Any]


def http_reference() -> str:
    """Every route with its parameters, body and replies, then every schema."""
    with TemporaryDirectory() as folder:
        api = create_app(Settings(engine="torch", store=Path(folder) / "store")).openapi()
    routes = [
        (operation["tags"][0], _route(method, path, operation))
        for path, operations in api["paths"].items()
        for method, operation in operations.items()
    ]
    parts: list[str] = []
    for tag in dict.fromkeys(tag for tag, _ in routes):
        parts += [f"## {_TAGS.get(tag, tag.capitalize())}", *(text for of, text in routes if of == tag)]
    schemas: Mapping[str, Schema] = api["components"]["schemas"]
    return "\n\n".join([*parts, "## Schemas", *(_schema(name, schema) for name, schema in sorted(schemas.items()))])


def _route(method: str, path: str, operation: Schema) -> str:
    parts = [f"### {method.upper()} {path}", operation.get("description", operation.get("summary", ""))]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [(f"`{p['name']}`", p["in"], _type(p["schema"]), p.get("description", "")) for p in parameters]
        parts.append(table(("parameter", "in", "type", "what"), rows))
    body = operation.get("requestBody")
    if body is not None:
        parts.append("Body: " + _content(body))
    rows = [
        (status, _content(reply), " ".join(str(reply.get("description", "")).split()))
        for status, reply in operation["responses"].items()
    ]
    parts.append(table(("status", "reply", ""), rows))
    return "\n\n".join(parts)


def _content(item: Schema) -> str:
    found = [
        f"{_type(content['schema'])}{'' if kind == 'application/json' else f' as `{kind}`'}"
        for kind, content in item.get("content", {}).items()
        if content.get("schema")
    ]
    return " or ".join(found) or "none"


def _schema(name: str, schema: Schema) -> str:
    parts = [f"### {name} {{#{name.lower()}}}"]
    if schema.get("description"):
        parts.append(schema["description"].split("\n\n")[0])
    if "enum" in schema:
        parts.append("One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".")
    properties: Mapping[str, Schema] = schema.get("properties", {})
    if properties:
        needed: Sequence[str] = schema.get("required", ())
        rows = [(f"`{key}`", _type(field), _default(key, field, needed), field.get("description", ""))
                for key, field in properties.items()]  # fmt: skip
        parts.append(table(("field", "type", "default", "what"), rows))
    return "\n\n".join(parts)


def _default(name: str, field: Schema, needed: Sequence[str]) -> str:
    return "" if name in needed or "default" not in field else f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def _type(schema: Schema) -> str:
    """A type in words, a schema's name as a link."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_SCHEMAS)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema.get("anyOf", schema.get("oneOf", ()))))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return "list of " + _type(schema.get("items", {}))
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return "object of " + _type(schema["additionalProperties"])
    return kind + _range(schema)


def _range(schema: Schema) -> str:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {schema[bound]:,}" for bound, sign in bounds.items() if bound in schema]
    if "maxLength" in schema:
        told.append(f"at most {schema['maxLength']:,} characters")
    return f" ({', '.join(told)})" if told else ""
