"""Plain Python values as JSON and back, and messages of a bounded size over pipes. Standard library only.

What crosses from code under test to its tests is data: no object whose `__eq__` says yes to everything, no pickle.
"""

import json
import os
from typing import Any

MAX_BYTES = 16 << 20
"""Of a message."""
_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """A value as JSON has it. Raises `TypeError` for one that is no number, text, bytes, or container of such."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    raise TypeError(f"gave a {type(value).__name__}, and only plain values can be tested")


def decode(value: Any) -> Any:
    """The value that `encode` was given, of the plain types."""
    if not isinstance(value, dict):
        return value
    ((name, held),) = value.items()
    if name == "int":
        return int(held, 16)
    if name == "complex":
        return complex(*held)
    if name == "bytes":
        return bytes.fromhex(held)
    if name == "dict":
        return {decode(key): decode(item) for key, item in held}
    return _KINDS[name](decode(item) for item in held)


def send(handle: int, message: Any) -> None:
    """Write one message to a pipe."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(handle, data) :]


def receive(handle: int) -> Any:
    """Read one message. Raises `EOFError` where the other side is gone, `ValueError` where it is too long or none."""
    size = int.from_bytes(_exactly(handle, 8), "big")
    if size > MAX_BYTES:
        raise ValueError(f"a message of {size} bytes, more than {MAX_BYTES}")
    return json.loads(_exactly(handle, size))


def _exactly(handle: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(handle, min(size, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
