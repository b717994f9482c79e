"""Reads a request's body: what the router must know of it, everything else passed through.

Three shapes: SGLang's /generate, OpenAI's /v1/completions and /v1/chat/completions. Whatever is
no such request ends as a `BadRequestError` with one clear line, here and not in an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.requests import Prompt

GENERATE: Final = "/generate"
COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
PATHS: Final = (GENERATE, COMPLETIONS, CHAT)

CHARACTERS_PER_TOKEN: Final = 4.0
"""How a prompt that comes as text is counted: the router has no tokenizer."""
DEFAULT_NEW_TOKENS: Final = {GENERATE: 128, COMPLETIONS: 16, CHAT: 128}
MAX_TOP_LOGPROBS: Final = 128
"""What a prefill server can hand to a decode server."""


class BadRequestError(VoltanaError):
    """A body that cannot be read as a request; the message goes to the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """One checked request."""

    path: str
    fields: dict[str, msgspec.Raw]
    input_tokens: int
    """Exact for token ids; estimated from the characters of a text."""
    max_new_tokens: int
    is_exact: bool
    """It will make exactly that many: `ignore_eos`."""
    is_stream: bool

    def prompt(self) -> Prompt | None:
        """Its token ids, each a segment of one token; None where it is a text."""
        raw = self.fields.get("input_ids" if self.path == GENERATE else "prompt")
        tokens = "" if raw is None else _flat(_prompt.decode(raw))
        ids = [token for token in tokens if isinstance(token, int)]
        return Prompt(ids, [1] * len(ids)) if ids else None

    def as_it_came(self) -> bytes:
        """The body for a server that does both phases."""
        return _encoder.encode(self.fields)

    def encode(self, bootstrap_host: str, bootstrap_port: int, room: int) -> bytes:
        """The body for both servers of a pair; a client's own bootstrap fields are overwritten.

        Args:
            bootstrap_host: Where the decode server asks for the KV.
            bootstrap_port: Its port.
            room: Number that pairs both halves of the request.
        """
        bootstrap = {
            "bootstrap_host": bootstrap_host,
            "bootstrap_port": bootstrap_port,
            "bootstrap_room": room,
        }
        return _encoder.encode({**self.fields, **bootstrap})


_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder: Final = msgspec.json.Encoder()
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ids: Final = msgspec.json.Decoder(list[int])
_optional_ids: Final = msgspec.json.Decoder(list[int] | None)
_prompt: Final = msgspec.json.Decoder(str | list[str | int | list[int]])
_text: Final = msgspec.json.Decoder(str)
_optional_text: Final = msgspec.json.Decoder(str | None)
_flag: Final = msgspec.json.Decoder(bool | None)
_count: Final = msgspec.json.Decoder(int | None)
_params: Final = msgspec.json.Decoder(dict[str, Any] | None)
_messages: Final = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def parse_body(path: str, data: bytes, vocab_size: int | None = None) -> Body:
    """Check a body.

    Args:
        path: What is asked for, one of `PATHS`.
        data: The body.
        vocab_size: Token ids must lie below; None: it is not known, and no id is let through.

    Raises:
        BadRequestError: Malformed JSON, a missing field, a wrong type or a value out of range.
    """
    try:
        fields = _object.decode(data)
    except _UNREADABLE as error:
        raise BadRequestError(f"the body must be a JSON object: {error}") from None
    stream = _read(fields, "stream", _flag, default=False)
    read = _generate if path == GENERATE else partial(_openai, path)
    tokens, new_tokens, is_exact = read(fields, vocab_size)
    if new_tokens < 1:
        raise BadRequestError(f"the number of new tokens must be >= 1, got {new_tokens}")
    return Body(
        path=path,
        fields=fields,
        input_tokens=tokens,
        max_new_tokens=new_tokens,
        is_exact=is_exact,
        is_stream=bool(stream),
    )


def _generate(fields: dict[str, msgspec.Raw], top: int | None) -> tuple[int, int, bool]:
    if ("text" in fields) == ("input_ids" in fields):
        raise BadRequestError("a request must have either text or input_ids")
    if "text" in fields:
        tokens = _count_text(_read(fields, "text", _text))
    else:
        tokens = _count_ids(_read(fields, "input_ids", _ids), top)
    _read(fields, "rid", _optional_text, default=None)  # a list ends the stream, not the request
    _check_logprobs(fields, tokens, top)
    params = _read(fields, "sampling_params", _params, default=None) or {}
    new_tokens = params.get("max_new_tokens")
    if new_tokens is None:
        new_tokens = DEFAULT_NEW_TOKENS[GENERATE]
    if type(new_tokens) is not int:
        raise BadRequestError(f"max_new_tokens must be a whole number, got {new_tokens!r}")
    if params.get("n", 1) != 1:
        raise BadRequestError("n must be 1: send one request for each answer")
    return tokens, new_tokens, params.get("ignore_eos") is True


def _check_logprobs(fields: dict[str, msgspec.Raw], input_tokens: int, top: int | None) -> None:
    """Ranges that SGLang 0.5.23 does not check and whose violation ends its server."""
    start = _read(fields, "logprob_start_len", _count, default=None)
    if start is not None and not -1 <= start <= input_tokens:
        raise BadRequestError(f"logprob_start_len must be in -1..{input_tokens}, got {start}")
    _check_top_logprobs(fields, "top_logprobs_num", top)
    ids = _read(fields, "token_ids_logprob", _optional_ids, default=None)
    if ids:
        _count_ids(ids, top)


def _check_top_logprobs(fields: dict[str, msgspec.Raw], name: str, top: int | None) -> None:
    most = MAX_TOP_LOGPROBS if top is None else min(top, MAX_TOP_LOGPROBS)
    number = _read(fields, name, _count, default=None)
    if number is not None and not 0 <= number <= most:
        raise BadRequestError(f"{name} must be in 0..{most}, got {number}")


def _openai(path: str, fields: dict[str, msgspec.Raw], top: int | None) -> tuple[int, int, bool]:
    if _read(fields, "n", _count, default=1) not in (None, 1):
        raise BadRequestError("n must be 1: send one request for each answer")
    if _read(fields, "best_of", _count, default=1) not in (None, 1):
        raise BadRequestError("best_of must be 1: send one request for each answer and choose")
    _check_top_logprobs(fields, "top_logprobs" if path == CHAT else "logprobs", top)
    tokens = _count_messages(fields) if path == CHAT else _count_prompt(fields, top)
    new_tokens = _read(fields, "max_tokens", _count, default=None)
    if path == CHAT and new_tokens is None:
        new_tokens = _read(fields, "max_completion_tokens", _count, default=None)
    is_exact = bool(_read(fields, "ignore_eos", _flag, default=False))
    return tokens, DEFAULT_NEW_TOKENS[path] if new_tokens is None else new_tokens, is_exact


def _count_prompt(fields: dict[str, msgspec.Raw], top: int | None) -> int:
    if "prompt" not in fields:
        raise BadRequestError("a request must have a prompt")
    prompt = _flat(_read(fields, "prompt", _prompt))
    if isinstance(prompt, str):
        return _count_text(prompt)
    if not all(isinstance(token, int) for token in prompt):
        raise BadRequestError("a request must have one prompt: send several as several requests")
    return _count_ids([token for token in prompt if isinstance(token, int)], top)


def _flat(prompt: str | list[Any]) -> str | list[Any]:
    """A list of one prompt is that prompt."""
    is_nested = isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int)
    return prompt[0] if is_nested else prompt


def _count_messages(fields: dict[str, msgspec.Raw]) -> int:
    if "messages" not in fields:
        raise BadRequestError("a request must have messages")
    messages = _read(fields, "messages", _messages)
    if not messages:
        raise BadRequestError("messages must not be empty")
    if any("role" not in message for message in messages):
        raise BadRequestError("every message must have a role")
    characters = sum(len(bytes(m["content"])) for m in messages if "content" in m)
    return max(round(characters / CHARACTERS_PER_TOKEN), 1)


def _count_text(text: str) -> int:
    if not text:
        raise BadRequestError("the prompt must not be empty")
    return max(round(len(text) / CHARACTERS_PER_TOKEN), 1)


def _count_ids(ids: list[int], top: int | None) -> int:
    if not ids:
        raise BadRequestError("the prompt must not be empty")
    if top is None:
        raise BadRequestError(
            "token ids cannot be checked, no server tells its vocabulary: send text, or state "
            "[router] vocab_size"
        )
    if min(ids) < 0 or max(ids) >= top:
        raise BadRequestError(f"token ids must be in 0..{top - 1}")
    return len(ids)


_REQUIRED: Final = object()


def _read(
    fields: dict[str, msgspec.Raw],
    name: str,
    decoder: msgspec.json.Decoder[Any],
    default: object = _REQUIRED,
) -> Any:  # noqa: ANN401 (whatever the decoder gives)
    raw = fields.get(name)
    if raw is None:
        assert default is not _REQUIRED
        return default
    try:
        return decoder.decode(raw)
    except _UNREADABLE as error:
        raise BadRequestError(f"{name}: {error}") from None
