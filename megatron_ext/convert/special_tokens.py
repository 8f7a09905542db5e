"""The ids of special tokens that config.json and generation_config.json have to say. Pure.

transformers takes the family's own where they are left out, Llama's 2 for the end of a text, and
``generate()`` then never stops.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.convert.families import FAMILIES
from megatron_ext.runtime.texts import parse_json

KINDS = ("bos", "eos", "pad")
GENERATION = "generation_config.json"


def special_ids(
    origin: Mapping[str, Any], files: Mapping[str, bytes], num_rows: int
) -> dict[str, Any]:
    """Return ``bos_token_id`` and the like; None where a model has none that is known.

    Args:
        origin: config.json of the model it comes from, or an empty one. What it says holds, and
            what its family stands for.
        files: of the tokenizer, by name; asked where there is no origin.
        num_rows: of the embedding; an id that nothing but this points to needs a row.
    """
    family = FAMILIES.get(origin.get("model_type"))
    other = family.defaults if family else ids_in(files)
    other = {name: other.get(name) for name in (f"{kind}_token_id" for kind in KINDS)}
    other = {name: value if _has_row(value, num_rows) else None for name, value in other.items()}
    return other | {name: origin[name] for name in other if name in origin}


def ids_in(files: Mapping[str, bytes]) -> dict[str, int]:
    """Return the ids that the files of a tokenizer say."""
    contents = {name: _json(text) for name, text in files.items() if name.endswith(".json")}
    texts = contents.get("special_tokens_map.json", {}) | contents.get("tokenizer_config.json", {})
    vocabulary = _vocabulary(contents, files.get("vocab.txt", b""))
    found = _sentencepiece_ids(files.get("tokenizer.model")) if not vocabulary else {}
    for kind in KINDS:
        token = texts.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in vocabulary:
            found[f"{kind}_token_id"] = vocabulary[text]
    return found


def tokens_from(files: Mapping[str, bytes], first: int) -> list[str]:
    """Return the tokens with ids of ``first`` and more, as far as the files say them."""
    contents = {name: _json(text) for name, text in files.items() if name.endswith(".json")}
    vocabulary = _vocabulary(contents, files.get("vocab.txt", b""))
    return sorted((t for t, n in vocabulary.items() if n >= first), key=vocabulary.get)


def _vocabulary(contents: Mapping[str, Any], lines: bytes) -> dict[str, int]:
    """Return the ids of tokens by their text, in the layouts of all of Hugging Face's files."""
    whole = contents.get("tokenizer.json", {})
    words = whole.get("model", {}).get("vocab", {})
    if isinstance(words, list):  # unigrams with their scores
        words = {word: number for number, (word, _) in enumerate(words)}
    vocabulary = {word: number for number, word in enumerate(lines.decode().splitlines())}
    vocabulary |= contents.get("vocab.json", {}) | words | contents.get("added_tokens.json", {})
    decoder = contents.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    vocabulary |= {token["content"]: int(number) for number, token in decoder.items()}
    return vocabulary | {token["content"]: token["id"] for token in whole.get("added_tokens", [])}


def _sentencepiece_ids(model: bytes | None) -> dict[str, int]:
    if model is None:
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_proto=model)
    except RuntimeError:  # another kind of tokenizer.model
        return {}
    ids = {f"{kind}_token_id": getattr(pieces, f"{kind}_id")() for kind in KINDS}
    return {name: number for name, number in ids.items() if number >= 0}


def _json(text: bytes) -> dict[str, Any]:
    """Return the object in a file that was carried along unread; an empty one if there is none."""
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _has_row(value: int | list[int] | None, num_rows: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(each is not None and 0 <= each < num_rows for each in ids)
