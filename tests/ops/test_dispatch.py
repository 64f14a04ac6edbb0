from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch

CALLS: list[str] = []


def only_float32(x: torch.Tensor) -> str:
    return "" if x.dtype == torch.float32 else f"float32 only, got {dispatch.describe(x)}"


@pytest.fixture(autouse=True)
def fake_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations: ``double`` with the backends fast (float32, not by default above 4 numbers) and plain, ``triple`` with
    plain; the backend missing cannot be had."""
    for name in ("_rules", "_defaults", "_loaders", "_state", "_forced"):
        monkeypatch.setattr(dispatch, name, {})
    CALLS.clear()
    dispatch.register_backend("missing", lambda: CALLS.append("missing") or "no such thing")  # type: ignore[func-returns-value]
    dispatch.register("double", "missing", lambda x: "")
    dispatch.register("double", "fast", only_float32, default=lambda x: "" if x.numel() <= 4 else "too large")
    dispatch.register("double", "plain", lambda x: "")
    dispatch.register("triple", "plain", only_float32)
    dispatch.load_backend("missing")  # the others are PyTorch's own, which nobody loads


def choices() -> list[str]:
    small, large, half = torch.ones(2), torch.ones(5), torch.ones(2, dtype=torch.bfloat16)
    return [dispatch.choose("double", x) for x in (small, large, half)] + [dispatch.choose("triple", half)]


def test_the_first_that_takes_the_inputs_is_chosen() -> None:
    assert choices() == ["fast", "plain", "plain", "reference"]


def test_one_name_forces_it_wherever_it_can_be() -> None:
    with ops.use_backend("fast"):
        assert choices() == ["fast", "fast", "plain", "reference"]  # also where it is not the default
    with ops.use_backend("reference"):
        assert choices() == ["reference"] * 4
    assert choices() == ["fast", "plain", "plain", "reference"]


def test_an_operation_is_forced_strictly() -> None:
    with ops.use_backend(double="fast"):
        assert dispatch.choose("double", torch.ones(5)) == "fast"
        with pytest.raises(InputError, match=r"double: the forced backend 'fast' .* float32 only, got cpu bfloat16 \(2,\)"):
            dispatch.choose("double", torch.ones(2, dtype=torch.bfloat16))
        with ops.use_backend("plain", double="reference"):
            assert choices() == ["reference"] * 4
            assert dispatch.choose("triple", torch.ones(2)) == "plain"
        assert dispatch.forced() == {"double": "fast"}
    assert dispatch.forced() == {}


def test_an_error_inside_gives_the_choice_back() -> None:
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert dispatch.forced() == {}


def test_unknown_and_missing_backends_are_refused() -> None:
    with (
        pytest.raises(InputError, match="unknown backend 'fats'; known: fast, missing, plain, reference"),
        ops.use_backend("fats"),
    ):
        pass
    with pytest.raises(InputError, match="unknown backend 'fast' of triple; known: plain, ref"), ops.use_backend(triple="fast"):
        pass
    with pytest.raises(InputError, match="unknown operation 'treble'; known: double, triple"), ops.use_backend(treble="plain"):
        pass
    with pytest.raises(InputError, match="this machine has no backend 'missing': no such thing"), ops.use_backend("missing"):
        pass
    assert dispatch.forced() == {}


def test_a_missing_backend_is_tried_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._state.clear()
    CALLS.clear()
    with caplog.at_level(logging.INFO, logger="textok_fast.ops"):
        for _ in range(3):
            assert dispatch.load_backend("missing") == "no such thing"
    assert CALLS == ["missing"]
    assert [record.getMessage() for record in caplog.records] == ["operations: no missing backend here (no such thing)"]


def test_exporting_takes_the_reference_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert choices() == ["reference"] * 4
    with ops.use_backend("plain"):
        assert choices() == ["reference"] * 4  # a preference, and an exported file must not need our library
    with ops.use_backend(double="plain"):
        assert choices() == ["plain", "plain", "plain", "reference"]


def test_the_innermost_choice_holds() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    with ops.use_backend(double="fast"):
        with ops.use_backend("reference"):
            assert choices() == ["reference"] * 4
        with pytest.raises(InputError, match="forced backend 'fast'"):
            dispatch.choose("double", half)


def test_backends_lists_them_in_order_of_preference() -> None:
    assert dispatch.backends("double") == {"missing": "no such thing", "fast": "", "plain": "", "reference": ""}
    assert list(dispatch.backends("double")) == ["missing", "fast", "plain", "reference"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", {"*": "plain"}),
        (" double = fast , triple=reference ", {"double": "fast", "triple": "reference"}),
        ("plain,double=fast", {"*": "plain", "double": "fast"}),
        ("", {}),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, text: str, wanted: dict[str, str]) -> None:
    monkeypatch.setenv("TEXTOK_OPS", text)
    dispatch.force_from_environment()
    assert dispatch.forced() == wanted


def test_a_mistake_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTOK_OPS", "double=slow")
    with pytest.raises(InputError, match=r"^TEXTOK_OPS=double=slow: unknown backend 'slow' of double"):
        dispatch.force_from_environment()


def test_the_environment_holds_in_a_new_process() -> None:
    code = "from textok_fast.ops import dispatch; print(dispatch.forced())"
    environment = {**os.environ, "TEXTOK_OPS": "reference,layer_norm_modulate=reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'*': 'reference', 'layer_norm_modulate': 'reference'}"


def test_compiled_code_follows_a_changed_choice() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * {"fast": 2, "plain": 3, "reference": 4}[dispatch.choose("double", x)]

    x = torch.ones(2)
    assert function(x)[0] == 2
    with ops.use_backend("plain"):
        assert function(x)[0] == 3
    with ops.use_backend(double="reference"):
        assert function(x)[0] == 4
    assert function(x)[0] == 2
