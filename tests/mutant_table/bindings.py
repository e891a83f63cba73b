"""Breaks between the frameworks and the compiled code."""

from .mutant import BINDINGS, CASES, LAUNCHES, TRANSPOSED, Mutant, binding

COMPILED = "tests/torch/test_compiled.py::"
REMEMBERED = "tests/torch/test_remembered_options.py::"

MUTANTS = [
    Mutant(
        "bindings: row_stats takes labels that do not lie row by row",
        BINDINGS,
        "labels = labels.contiguous()  # under",
        "labels = labels  # under",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: set_label_ takes vectors that do not lie row by row",
        BINDINGS,
        "labels, elements = labels.contiguous(), elements.contiguous()",
        "labels, elements = labels, elements",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: row_grad takes coefficients that do not lie row by row",
        BINDINGS,
        "a, b, c = a.contiguous(), b.contiguous(), c.contiguous()",
        "a, b, c = a, b, c",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: Triton's row_stats_grad takes an alpha that does not lie row by row",
        LAUNCHES,
        "(alpha.contiguous(), beta.contiguous(), weight)",
        "(alpha, beta.contiguous(), weight)",
        f"{CASES}{TRANSPOSED}[triton]",
    ),
    Mutant(
        "bindings: Triton's set_label_ takes labels that do not lie row by row",
        LAUNCHES,
        "given = (labels.contiguous(), elements.contiguous(), label_logit)",
        "given = (labels, elements.contiguous(), label_logit)",
        f"{CASES}{TRANSPOSED}[triton]",
    ),
    binding(
        "a whole call takes labels that do not lie row by row",
        "if x.dtype is dtype and x.is_contiguous():",
        "if x.dtype is dtype:",
        "transposed labels",
    ),
    binding(
        "flags by row are read by sequence",
        "by_row = x.shape == self.shape",
        "by_row = False",
        "truncated, by row",
    ),
    binding(
        "detach_next is not handed on",
        "self.call.detach_next = given.detach_next",
        "self.call.detach_next = False",
        "detached",
    ),
    binding(
        "the items of the agents for those of the experts",
        "call.weighting.num_items[0] = expert;",
        "call.weighting.num_items[0] = agent;",
        "experts and agents, items",
    ),
    binding(
        "bootstrap is drop",
        'name == "bootstrap" ? Boundary::bootstrap',
        'name == "bootstrap" ? Boundary::drop',
        "the gradient of an ignored row",
    ),
    Mutant(
        "bindings: row_grad takes B for C",
        BINDINGS,
        "pointer<const float>(c), pointer<void>(dlogits), layout, readout);",
        "pointer<const float>(b), pointer<void>(dlogits), layout, readout);",
        "tests/kernels/test_native.py::TestNative::test_random_batches",
    ),
    Mutant(
        "compiled: a gradient may be claimed twice",
        ("irl_ops/torch/compiled.py",),
        'issued.__dict__.pop("gradient", None)',
        'issued.__dict__.get("gradient")',
        f"{COMPILED}test_each_gradient_is_handed_over_once",
    ),
    Mutant(
        "compiled: equal losses are one",
        ("irl_ops/torch/compiled.py",),
        'torch.empty(0, device="cpu"),',
        "logits.detach()[:0],",
        f"{COMPILED}test_equal_losses_have_a_gradient_each",
    ),
    Mutant(
        "compiled: values are the next ones",
        ("irl_ops/torch/compiled.py",),
        "call.heads.values,\n        call.heads.next_values,",
        "call.heads.next_values,\n        call.heads.values,",
        f"{COMPILED}test_operators_have_the_numbers_of_the_naive_losses",
    ),
    Mutant(
        "options: True stands for a 1 that was read before",
        ("irl_ops/call.py",),
        "@functools.lru_cache(_REMEMBERED, typed=True)  # 1,",
        "@functools.lru_cache(_REMEMBERED)  # 1,",
        f"{REMEMBERED}test_equal_options_of_another_type_are_refused",
    ),
    Mutant(
        "options: a tuple of equal numbers stands for one that was read before",
        ("irl_ops/call.py",),
        "type(x) is tuple and all(type(i) is int for i in x)",
        "type(x) is tuple",
        f"{REMEMBERED}test_equal_options_of_another_type_are_refused",
    ),
]
