"""The kinds of sub-layers, a module each, in the order of a layer.

A module of a kind has:
    NAME, SYMBOL        of the kind, in scores and plans; Megatron's, in a pattern
    Sizes               its fields of ``Arch``: flags and saved args
    problems(arch)      how they contradict each other
    dims(arch)          length of its named dims
    weights(arch, name) its rows of the table of weights
    multiply_adds(arch, seq_length)     of one token beside the weights'
    DEPTH, AXES, UNCUT  what pruning cuts: the sub-layers, their units; dims without units
"""

from megatron_ext.arch import attention, mamba, mlp, moe

MODULES = (attention, mlp, moe, mamba)
KINDS = {kind.NAME: kind for kind in MODULES}
SYMBOLS = {kind.NAME: kind.SYMBOL for kind in MODULES}
