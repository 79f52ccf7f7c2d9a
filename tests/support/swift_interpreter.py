"""Triton's interpreter without what it does again and again: most of its time, and nothing of its results.

And with what numpy 2.4 takes from Triton 3.6, which makes numbers of arrays that have a dimension of one element.
"""

import functools


def hasten(interpreter):
    """Patch what the module `triton.runtime.interpreter` calls; a version that lacks one of these keeps its pace."""
    core, semantic = interpreter.tl.core, type(getattr(interpreter, "interpreter_semantic", None))
    for place, name, make in (
        (interpreter, "_patch_lang", _patching_once(interpreter)),
        (interpreter, "_patch_builtin", _patching),
        (interpreter, "_patch_lang_tensor", _numbers),
        (interpreter, "_get_np_dtype", _dtypes),
        (core.dtype, "__eq__", _equal_dtypes),
        (core.block_type, "__init__", _block_types),
        (core.tensor, "__init__", _tensors),
        (semantic, "binary_op_sanitize_overflow_impl", _overflows),
        (semantic, "computation_type_impl", _computation_types),
        (semantic, "broadcast_impl_value", _broadcasts),
    ):
        if hasattr(place, name):
            setattr(place, name, make(core, getattr(place, name)))


def _patching_once(interpreter):
    """Each call of a function within a kernel patches the language, which its launch has done."""
    own_range = {id(lang): lang.range for lang in (interpreter.tl, interpreter.tl.core)}

    @functools.cache
    def langs(fn):
        return [lang for lang in fn.__globals__.values() if id(lang) in own_range]

    def make(core, own):
        @functools.wraps(own)
        def patch(fn):
            if all(lang.range is not own_range[id(lang)] for lang in langs(fn)):
                return interpreter._LangPatchScope()
            return own(fn)

        return patch

    return make if hasattr(interpreter, "_LangPatchScope") else lambda core, own: own


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


def _equal_dtypes(core, own):
    """Almost every comparison is of one object with itself."""

    @functools.wraps(own)
    def equal(self, other):
        return self is other or own(self, other)

    return equal


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


def _overflows(core, own):
    """Each sum of integers is computed again in 64 bits, for an assertion that only holds while debugging."""

    @functools.wraps(own)
    def check(self, *args):
        if self.builder.options.debug:
            own(self, *args)

    return check


def _computation_types(core, own):
    """Which type two types make is looked up by their names."""
    made = {}

    @functools.wraps(own)
    def computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in made:
            made[key] = own(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return made[key]

    return computation_type


def _broadcasts(core, own):
    """Shapes are looked through axis by axis, as numbers of the language that are slow to compare."""
    made = {}

    @functools.wraps(own)
    def broadcast(self, lhs, rhs):
        both, names = (lhs, rhs), (lhs.type.name, rhs.type.name)
        if names not in made:
            found = own(self, lhs, rhs)
            made[names] = [how(self, old, new) for old, new in zip(both, found, strict=True)]
            return found
        if None in made[names]:
            return own(self, lhs, rhs)
        return tuple(make(self, x) for make, x in zip(made[names], both, strict=True))

    def how(semantic, old, new):
        if new is old:
            return lambda self, x: x
        kind = new.type
        shape, ir = [*map(int, kind.shape)], kind.to_ir(semantic.builder)
        if not old.type.is_block():
            return lambda self, x: self.tensor(self.builder.create_splat(ir, x.handle), kind)
        if len(old.type.shape) < len(shape):
            return None
        return lambda self, x: self.tensor(self.builder.create_broadcast(x.handle, shape), kind)

    return broadcast
