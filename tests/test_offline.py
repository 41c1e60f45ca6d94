"""Machine code of every kernel for all targets, compiled by `offline.py`."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SEARCHES = {
    "slab": "slab_search_kernel",
    "rolled": "rolled_search_kernel",
    "direct": "direct_search_kernel",
}
KIB = 1 << 10
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
SHARED_SAFE = 48 * KIB
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory
# Instruction for products of tiles of 64 queries or more, and for fewer.
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
PRODUCT_OF_FEWER = {"sm_90": "mma.sync", "sm_100": "mma.sync"}
DESCRIPTORS = ("sm_90", "sm_100")
# The innermost stride of query and of key may be specialised to 1.
VARIANTS = {"pack_kernel": 2, "amax_kernel": 2}

Document = dict[str, Any]
Case = dict[str, Any]
Kernel = dict[str, Any]


def compiled(target: str, algorithm: str, *options: str) -> Document:
    """Report of `offline.py`. Compiled kernels are kept in `build` until they change."""
    version = importlib.metadata.version("triton")
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build/triton-cache" / version)
    command = [sys.executable, "tests/offline.py", target, algorithm, *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line[:300] for line in result.stderr.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if line.startswith("compiling ")), "")
        end = "\n".join([last, *lines[-15:]])
        pytest.fail(f"{' '.join(command[1:])} ended with {result.returncode}:\n{end}", False)
    document = json.loads(result.stdout)
    assert document["triton"] == version
    return document


def kernels(document: Document) -> Iterator[tuple[Case, Kernel]]:
    """Every kernel with every case that uses it."""
    for case in document["cases"]:
        for number in case["kernels"]:
            yield case, document["kernels"][number]


def label(case: Case, *names: str) -> str:
    """Name of a case in the message of a failed test."""
    words = [case["operands"], f"{case['tile']} tile {tuple(case['sizes'].values())}"]
    words += [f"{case['channels']} channels"]
    words += ["channels_last"] * case["channels_last"] + ["masked"] * case["masked"]
    words += [f"{case['kernel_size']}x{case['kernel_size']}"] * (case["kernel_size"] != 3)
    words += [f"normalize={case['normalize']}"] * (case["normalize"] != "both")
    words += ["add_eps"] * case["add_eps"]
    return ", ".join((*names, *words))


def product(target: str, case: Case) -> str | None:
    """Instruction for products; None without tensor cores."""
    if PRODUCTS[target] != "v_mfma" and case["operands"] == "fp32":
        return None  # NVIDIA's tensor cores have no IEEE product of float32
    if case["sizes"]["block_q"] < 64:
        return PRODUCT_OF_FEWER.get(target, PRODUCTS[target])
    return PRODUCTS[target]


def failures(document: Document) -> dict[str, str]:
    return {label(case): case["error"] for case in document["cases"] if case["error"]}


def spills(document: Document) -> dict[str, str]:
    """Registers spilled to memory; AMD's scalars may be spilled to lanes of a vector."""
    return {
        label(case, kernel["name"]): f"{kernel['local']} bytes, {kernel['registers']} registers"
        for case, kernel in kernels(document)
        if kernel["spilled"] or kernel["local"]
    }


def too_large(document: Document, target: str) -> dict[str, tuple[int, int]]:
    """Kernels with more shared or tensor memory than the target has, or than is safe."""
    most = {"table": SHARED[target], "safe": min(SHARED[target], SHARED_SAFE)}
    return {
        label(case, kernel["name"]): (kernel["shared"], kernel["tensor_columns"])
        for case, kernel in kernels(document)
        if kernel["shared"] > most[case["tile"]] or kernel["tensor_columns"] > TENSOR_COLUMNS
    }


def wrong_products(document: Document, target: str, algorithm: str) -> dict[str, list[str]]:
    """Kernels with other products than `product`; the slab's have none."""
    wrong = {}
    for case, kernel in kernels(document):
        multiplies = algorithm != "slab" and kernel["name"] == SEARCHES[algorithm]
        wanted = product(target, case) if multiplies else None
        right = [found for found in kernel["products"] if wanted and found.startswith(wanted)]
        if case["operands"] == "fp32":
            right = [found for found in right if found.endswith("_f32")]
        if right != kernel["products"] or (wanted and not right):
            wrong[label(case, kernel["name"])] = kernel["products"]
    return wrong


def wrong_copies(document: Document, target: str) -> dict[str, bool]:
    """Kernels with unexpected copies: descriptors are for the rolled search alone."""
    return {
        label(case, kernel["name"]): kernel["copies_blocks"]
        for case, kernel in kernels(document)
        if kernel["copies_blocks"]
        != (kernel["name"] == "rolled_search_kernel" and target in DESCRIPTORS)
    }


def variants(document: Document) -> dict[str, int]:
    """Kernels that compile again for another image size; a folder of images would take long."""
    too_many = {}
    for case in document["cases"]:
        counts = Counter(document["kernels"][number]["name"] for number in case["kernels"])
        for name, count in counts.items():
            if count > VARIANTS.get(name, 1):
                too_many[label(case, name)] = count
    return too_many


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels(target: str, algorithm: str) -> None:
    """All in one test, so that a target's kernels are compiled once in any worker."""
    document = compiled(target, algorithm)
    for case in document["cases"]:
        names = {document["kernels"][number]["name"] for number in case["kernels"]}
        assert case["error"] or {"pack_kernel", SEARCHES[algorithm], "rescore_kernel"} <= names
    faults = {
        "does not compile": failures(document),
        "spills": spills(document),
        "shared memory and columns of tensor memory": too_large(document, target),
        "instructions": wrong_products(document, target, algorithm),
        "copies by descriptor": wrong_copies(document, target),
        "kernels for a few sizes": variants(document),
    }
    assert {name: fault for name, fault in faults.items() if fault} == {}

    compiled_tiles = [case["sizes"] for case in document["cases"] if case["tile"] == "table"]
    places = {target, None} if target == "sm_100" else {target}  # sm_100 has no rows of its own
    rows = [
        tile
        for (name, where, _), tile in document["table"]
        if name == algorithm and where in places
    ]
    assert all(tile in compiled_tiles for tile in rows), "every row of the table"
    assert {where for (_, where, _), _ in document["table"]} <= {None, *TARGETS}


# Kernels with the most products on Hopper: minimum of thread blocks per multiprocessor, maximum of
# instructions of a thread per pair.
LIMITS = {
    ("rolled", "fp16"): (1, 26),
    ("rolled", "fp16x3"): (1, 58),
    ("rolled", "bf16"): (1, 26),
    ("direct", "fp16"): (1, 80),
    ("slab", "fp16"): (4, 18),
}


@pytest.mark.parametrize(("algorithm", "operands"), LIMITS)
def test_cost_of_a_pair(algorithm: str, operands: str) -> None:
    """Occupancy and instructions, from machine code; registers limit the number of blocks."""
    document = compiled("sm_90", algorithm)
    blocks, limit = LIMITS[algorithm, operands]
    checked = 0
    for case, kernel in kernels(document):
        if kernel["name"] != SEARCHES[algorithm] or case["operands"] != operands:
            continue
        if case["tile"] != "table" or case["channels"] != 256:
            continue
        checked += 1
        assert blocks_on_multiprocessor(kernel) >= blocks, kernel
        assert instructions_per_pair(algorithm, case, kernel) <= limit, kernel
    assert checked


def blocks_on_multiprocessor(kernel: Kernel) -> int:
    """Thread blocks on Hopper: warps have registers in units of 256, a block has 1 KiB overhead."""
    registers = -(-kernel["registers"] * 32 // 256) * 256 * kernel["warps"]
    return min((1 << 16) // registers, 228 * KIB // (kernel["shared"] + KIB), 64 // kernel["warps"])


def instructions_per_pair(algorithm: str, case: Case, kernel: Kernel) -> float:
    """Instructions of a thread per pair of a tile, if no score improves."""
    tile = case["sizes"]
    steps = case["channels"] // 64 * (3 if case["dtype"].endswith("x3") else 1)
    turns = {"rolled": 3, "direct": 9, "slab": 0}[algorithm] * steps
    pairs = tile["block_q"] * tile["block_k"] / (32 * kernel["warps"])
    return (kernel["loops"]["outer"] + turns * kernel["loops"]["inner"]) / pairs


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_options(algorithm: str) -> None:
    """Masks, patches of every size, few channels and no normalisation."""
    document = compiled("sm_90", algorithm, "--options")
    sizes = {1, 3, 5, 7} if algorithm == "direct" else {3}
    assert {(case["kernel_size"], case["masked"]) for case in document["cases"]} == {
        (size, masked) for size in sizes for masked in (False, True)
    }
    assert (failures(document), spills(document)) == ({}, {})
