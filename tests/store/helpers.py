"""What the tests of the store share: a picture of a folder, and GGUF files written by hand."""

import hashlib
import struct
from pathlib import Path


def snapshot(root: Path) -> dict[str, str]:
    """Every file and folder under `root`, with the hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


def gguf(
    family: str = "llama",
    file_type: int | None = 2,
    elements: int = 64,
    fill: bytes = b"\0",
    type: str = "",
) -> bytes:
    """A sound GGUF file, version 3, with one float32 tensor.  Source: the GGUF specification."""
    pairs = [_text("general.architecture") + struct.pack("<I", 8) + _text(family)]
    if file_type is not None:
        pairs.append(_text("general.file_type") + struct.pack("<II", 4, file_type))
    if type:
        pairs.append(_text("general.type") + struct.pack("<I", 8) + _text(type))
    tensor = _text("token_embd.weight") + struct.pack("<IQIQ", 1, elements, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor
    return head + b"\0" * (-len(head) % 32) + fill * (4 * elements)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
