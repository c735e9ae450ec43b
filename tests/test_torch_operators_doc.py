"""The table of operators that torch computes, and that none of ONNX's is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx.defs
import pytest

from graphopt.regression.golden_files import Golden
from graphopt.walk import ONNX_DOMAINS

pytest.importorskip("torch")

from graphopt.backends.torch_fx import catalog
from graphopt.backends.torch_fx.operators import Operator

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "torch-operators.md"
INTRODUCTION = """\
# Operators that torch computes

Each row is an operator of the backend `torch`, with the first version of its operator set that is computed; every newer
one is, too. A model with any other operator is refused before it runs, and the error names operators and nodes. The
last column is only a reminder: what ONNX, or for its own operators ONNX Runtime, defines holds to the letter. One thing
is not imitated: integer kernels that ONNX Runtime may choose inside `MatMulNBits` (`accuracy_level`) round what they
read, and torch computes in floats.

`pytest tests/test_torch_operators_doc.py --graphopt-update` makes this page of the tables.
"""
NAMES = {"": "ONNX"}
# What ONNX has and torch does not compute; Constant is no computation, and has no row either.
LEFT_OUT = frozenset({"Constant", "ImageDecoder"})


def test_document_is_in_step(golden: Golden) -> None:
    """`pytest tests/test_torch_operators_doc.py --graphopt-update` writes it anew."""
    golden("\n".join([INTRODUCTION, *sections()]), file=DOCUMENT)


def sections() -> Iterator[str]:
    for domain, tables in sorted(catalog.TABLES.items()):
        yield f"## {NAMES.get(domain, domain)}\n"
        yield "| Operator | From version | What it gives |"
        yield "|---|---|---|"
        rows = {name: found for table in tables for name, found in table.items()}
        for name, found in sorted(rows.items()):
            versions = found if isinstance(found, tuple) else (found,)
            said = (versions[-1].function.__doc__ or "").strip().splitlines()[0]
            yield f"| {name} | {versions[0].since} | {said} |"
        yield ""


def every_operator() -> Iterator[tuple[str, Operator]]:
    for tables in catalog.TABLES.values():
        for table in tables:
            for name, found in table.items():
                for one in found if isinstance(found, tuple) else (found,):
                    yield name, one


def test_every_operator_of_onnx_is_computed() -> None:
    newest = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    opset = onnx.defs.onnx_opset_version()
    lacking = {name for name in newest if catalog.find("", name, opset) is None}
    assert lacking == LEFT_OUT & newest


def test_every_attribute_of_onnx_is_known() -> None:
    opset = onnx.defs.onnx_opset_version()
    unknown = []
    for schema in onnx.defs.get_all_schemas():
        found = catalog.find("", schema.name, opset) if schema.domain in ONNX_DOMAINS else None
        if found is not None:
            unknown += [f"{schema.name}.{name}" for name in schema.attributes if name not in found.keywords]
    assert unknown == []


def test_every_function_says_what_it_gives() -> None:
    assert [name for name, one in every_operator() if not (one.function.__doc__ or "").strip()] == []


def test_functions_can_be_named_by_the_graph() -> None:
    """torch.fx writes calls of functions as the module and the name they have."""
    import importlib

    for _, one in every_operator():
        module = importlib.import_module(one.function.__module__)
        assert getattr(module, one.function.__qualname__, None) is one.function


def test_no_operator_is_in_two_tables() -> None:
    for tables in catalog.TABLES.values():
        names = [name for table in tables for name in table]
        assert len(names) == len(set(names))


def test_versions_ascend() -> None:
    for tables in catalog.TABLES.values():
        for table in tables:
            for found in table.values():
                since = [one.since for one in found] if isinstance(found, tuple) else [found.since]
                assert since == sorted(set(since))
