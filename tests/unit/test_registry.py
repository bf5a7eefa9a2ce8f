"""The registry: lazy, ordered, no name twice, near names for unknown ones, entry points by the same door."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forgekit.errors import ConfigError
from forgekit.registry import Registry, unknown


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("shape", aliases={"disc": "circle"})
    registry.lazy("fraction", "fractions:Fraction")
    registry.register("circle")(str)
    registry.register("square")(int)
    return registry


def test_names_keep_their_order_and_lazy_ones_come_first(shapes):
    assert list(shapes) == shapes.names() == ["fraction", "circle", "square"]
    assert "circle" in shapes and "disc" in shapes and "cube" not in shapes


def test_register_gives_back_what_it_registers(shapes):
    @shapes.register("triangle")
    def triangle():
        """Three sides."""

    assert triangle.__doc__ == "Three sides." and shapes.get("triangle") is triangle


def test_aliases_lead_to_the_name(shapes):
    assert shapes.resolve("disc") == "circle" and shapes.get("disc") is str


def test_lazy_entries_are_imported_only_when_asked_for():
    code = (
        "import sys; from forgekit.registry import Registry; r = Registry('x'); r.lazy('tones', 'colorsys:rgb_to_hsv');"
        "assert list(r) == ['tones'] and 'tones' in r and r.resolve('tones') and 'colorsys' not in sys.modules;"
        "assert callable(r.get('tones')) and 'colorsys' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path = {sys.path!r}; {code}"], check=False)
    assert done.returncode == 0


def test_a_lazy_entry_is_the_attribute_itself_every_time(shapes):
    from fractions import Fraction

    assert shapes.get("fraction") is Fraction and shapes.get("fraction") is Fraction


def test_a_name_taken_twice_is_refused(shapes):
    for claim in (lambda: shapes.register("circle")(float), lambda: shapes.lazy("circle", "math:pi")):
        with pytest.raises(ConfigError, match="shape 'circle' is registered twice; rename one of the two"):
            claim()
    assert shapes.get("circle") is str


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("circel", "shape: unknown shape 'circel'; did you mean circle or disc?"),
        ("disk", "shape: unknown shape 'disk'; did you mean disc?"),
        ("qqq", "shape: unknown shape 'qqq'; choose one of fraction, circle, square, disc"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(shapes, name, told):
    with pytest.raises(ConfigError) as caught:
        shapes.get(name)
    assert str(caught.value) == told


def test_unknown_offers_at_most_three():
    assert str(unknown("kind", "aaa", ["aaab", "aaac", "aaad", "aaae"])).count(" or ") == 2


def test_users_extensions_enter_by_entry_points(tmp_path, monkeypatch):
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[forgekit.toy]\nball = mine_toys:BALL\n")
    (tmp_path / "mine_toys.py").write_text("BALL = 'a ball'\n")
    monkeypatch.syspath_prepend(tmp_path)
    toys = Registry("toy")
    assert toys.names() == ["ball"] and toys.get("ball") == "a ball"


def test_our_phases_enter_by_the_same_door():
    from agent_forge.pipeline.phase import PHASES

    assert "cognate" in PHASES.names() and PHASES.resolve("cognate") == "cognate"
    with pytest.raises(ConfigError, match="unknown phase 'curriculum'|unknown phase 'forge'"):
        Registry("phase", aliases={"forge": "curriculum"}).get("forge")
