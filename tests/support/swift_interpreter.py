"""Triton's interpreter without what it does again and again: about half of its time, and nothing of its results.

And with what numpy 2.4 takes from Triton 3.6, which makes numbers of arrays that have a dimension of one element.
"""

import functools


def hasten(interpreter):
    """Patch what the module `triton.runtime.interpreter` calls; a version that lacks one of these keeps its pace."""
    core = interpreter.tl.core
    for place, name, make in (
        (interpreter, "_patch_builtin", _patching),
        (interpreter, "_patch_lang_tensor", _numbers),
        (interpreter, "_get_np_dtype", _dtypes),
        (core.block_type, "__init__", _block_types),
        (core.tensor, "__init__", _tensors),
    ):
        if hasattr(place, name):
            setattr(place, name, make(core, getattr(place, name)))


def _patching(core, own):
    """Each call of a function within a kernel looks for what is left to patch in all of the language."""
    places = {}

    @functools.wraps(own)
    def patch(package, *args):
        names = places.get(package)
        if names is None:
            names = places[package] = [n for n in dir(package) if core.is_builtin(getattr(package, n, None))]
        # A launch patches all of these, and restores them all.
        if names and core.is_builtin(getattr(package, names[0])):
            own(package, *args)

    return patch


def _numbers(core, own):
    """Bounds of loops are arrays of one element."""

    @functools.wraps(own)
    def patch(tensor, scope):
        own(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _dtypes(core, own):
    """Each look at an array's dtype makes a table of them all."""
    of_scalar = functools.cache(own)

    @functools.wraps(own)
    def dtype_of(dtype):
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        return own(scalar) if isinstance(scalar, core.pointer_type) else of_scalar(scalar)

    return dtype_of


def _block_types(core, own):
    """Blocks of equal elements and shapes have equal attributes."""
    made = {}

    @functools.wraps(own)
    def init(self, element_ty, shape):
        key = element_ty.name, getattr(element_ty, "address_space", None), *shape
        if key in made:
            vars(self).update(made[key])
        else:
            own(self, element_ty, shape)
            made[key] = vars(self).copy()

    return init


def _tensors(core, own):
    """Tensors of equal types have the same shape, in a tuple of the language that is slow to make."""
    made = {}

    @functools.wraps(own)
    def init(self, handle, type):
        if type.name in made:
            vars(self).update(made[type.name], handle=handle, type=type, dtype=type.scalar)
        else:
            own(self, handle, type)
            made[type.name] = {n: v for n, v in vars(self).items() if n in ("shape", "numel")}

    return init
