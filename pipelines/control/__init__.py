"""Control of what pipelines draw through their attention: the style of one picture on the content of another.

`style.py` is `style_transfer`, `injection.py` what it does at attention modules, `trajectory.py` the noisy states of
given pictures.
"""

from visattn.pipelines.control.style import Styled, style_transfer

__all__ = ["Styled", "style_transfer"]
