"""JSON and YAML of any origin: what a text holds, or a ``ValueError`` with one line."""

import json
from typing import Any

import yaml

TOO_DEEP = "its lists or tables are nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds. Ten thousand brackets are no ``ValueError`` of json's."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds: plain values, no tags."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
