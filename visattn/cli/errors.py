"""Which errors a user can do something about, and how that is said in a line."""

from __future__ import annotations

import importlib.util
import re

# Which extra of the package brings a library.
EXTRAS = {
    **dict.fromkeys(("diffusers", "accelerate", "peft", "av"), "diffusers"),
    **{"timm": "timm", "transformers": "transformers"},
    **dict.fromkeys(("matplotlib", "sklearn", "skimage"), "all"),
}


def fixable(error: Exception) -> str:
    """What a user can do about an error, "" for a fault of the program."""
    from visattn.memory import is_shortage

    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(library)
        # A part that is missing of a library that is there is a fault of an installation, which the traceback tells.
        if extra is None or importlib.util.find_spec(library) is not None:
            return ""
        return f"this needs {library}, which is not installed: pip install 'visattn[{extra}]'"
    # Our own errors of memory name what needs it; those of numpy, torch and Python do not say what to do.
    if (type(error) is MemoryError and str(error)) or isinstance(error, ValueError | OSError):
        return str(error)
    # What safetensors says of a disk that is full or gone; it has no kind of its own for that.
    if type(error).__name__ == "SafetensorError" and "I/O error: " in str(error):
        return str(error).partition("I/O error: ")[2]
    if is_shortage(error):
        # torch begins with the place in its own code.
        asked = re.sub(r"^\[[^]]*\] err == 0\. ", "", str(error)) or "Python was refused some"
        return f"this needs more memory than there is ({asked}): choose a smaller size, grid or batch"
    return ""
