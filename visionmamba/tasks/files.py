"""Results on disk: texts and pictures that are there whole or not at all."""

import os
from pathlib import Path

from PIL import Image


def replace_file(target: Path, content: str | Image.Image) -> None:
    """Writes a text or a PNG under a temporary name first, so that it is never there by half."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content.save(temporary, format="PNG")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
