"""Configurations: frozen, strict, and refusals that name field, value, rule and remedy in one line."""

from __future__ import annotations

import pickle
from typing import Annotated

import pytest
from pydantic import Field, ValidationError, model_validator

from forgekit.config import Config, canonical_json, read_config_file
from forgekit.errors import ConfigError, DataError, ForgeError, ResourceError


class Inner(Config):
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How fast."""
    name: str = "x"
    """How called."""


class Outer(Config):
    steps: Annotated[int, Field(gt=0)]
    """Steps to take."""
    inner: Inner = Inner()
    """One of them."""
    many: tuple[Inner, ...] = ()
    """More of them."""
    table: dict[str, float] = {}
    """Numbers by name."""

    @model_validator(mode="after")
    def _rules(self):
        if self.steps == 13:
            raise ValueError("steps 13 and rate do not go together")
        if self.steps == 14:
            raise ConfigError("does not exist", where="many.0.name", remedy="choose another")
        return self


def refused(values, source="run.toml", path="") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Outer.build(values, source, path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"steps": -3},
            "run.toml: steps: value -3 refused: input should be greater than 0; give another value. Steps to take.",
        ),
        (
            {"steps": 1, "inner": {"rate": 7}},
            "run.toml: inner.rate: value 7 refused: input should be less than or equal to 1; "
            "give another value. How fast. Default: 0.5.",
        ),
        (
            {"steps": 1, "many": [{}, {"rate": "fast"}]},
            "run.toml: many.1.rate: value 'fast' refused: input should be a",
        ),
        ({"steps": 1, "table": {"a": "b"}}, "run.toml: table.a: value 'b' refused"),
        ({}, "run.toml: steps: missing; add steps = ..."),
        ({"steps": 1, "stepz": 2}, "run.toml: stepz: unknown key; did you mean steps or table?"),
        ({"steps": 1, "inner": {"rat": 2}}, "run.toml: inner.rat: unknown key; did you mean rate?"),
        ({"steps": 1, "many": [{"nam": "y"}]}, "run.toml: many.0.nam: unknown key; did you mean name?"),
        ({"steps": 1, "zzzz": 2}, "run.toml: zzzz: unknown key; known keys: steps, inner, many, table"),
        ({"steps": 13}, "run.toml: Outer: steps 13 and rate do not go together"),
        ({"steps": 14}, "run.toml: many.0.name: does not exist; choose another"),
    ],
)
def test_refusals_name_field_value_rule_and_remedy(values, told):
    assert str(refused(values)).startswith(told)


def test_the_place_inside_a_larger_configuration_is_told():
    assert str(refused({"steps": 0}, path="phases.own")).startswith("run.toml: phases.own.steps: value 0 refused")
    assert refused({"steps": 14}, source="", path="phases.own").where == "phases.own.many.0.name"
    assert refused({"steps": 13}, source="").where == "Outer"


def test_further_problems_are_counted():
    assert str(refused({"steps": 0, "zz": 1})).endswith("(and 1 more problem)")
    assert str(refused({"steps": 0, "zz": 1, "yy": 2})).endswith("(and 2 more problems)")


def test_long_values_are_cut_short():
    assert len(str(refused({"steps": "x" * 5000}))) < 200
    assert len(str(refused({"steps": 13, "table": {str(i): i for i in range(1000)}}))) < 200


def test_configurations_are_frozen():
    config = Outer(steps=1)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 2
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.rate = 1.0


def test_replace_validates_and_leaves_the_original_alone():
    config = Outer(steps=1, inner=Inner(rate=0.25))
    assert config.replace(steps=2) == Outer(steps=2, inner=Inner(rate=0.25)) and config.steps == 1
    with pytest.raises(ConfigError, match="value -1 refused"):
        config.replace(steps=-1)
    with pytest.raises(ConfigError, match="unknown key"):
        config.replace(stepz=1)


def test_equal_values_have_equal_fingerprints():
    one, other = (
        Outer.build({"steps": 1, "table": {"a": 1, "b": 2}}),
        Outer.build({"table": {"b": 2, "a": 1}, "steps": 1}),
    )
    assert one.fingerprint() == other.fingerprint() and len(one.fingerprint()) == 64
    assert one.fingerprint() != one.replace(steps=2).fingerprint()
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'


def test_files_are_toml_or_json(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 3\n[inner]\nrate = 0.1\n")
    (tmp_path / "a.json").write_text('{"steps": 3, "inner": {"rate": 0.1}}')
    toml, json = (Outer.build(read_config_file(tmp_path / f"a.{kind}")) for kind in ("toml", "json"))
    assert toml == json == Outer(steps=3, inner=Inner(rate=0.1))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.toml", b"steps = \n", "not valid toml: Invalid value (at line 1, column 9); mend the syntax"),
        ("a.json", b'{"steps": }', "not valid json: Expecting value: line 1 column 11"),
        ("a.json", b"[1]", "holds no table of keys; write `key = value` lines"),
        ("a.toml", b"name = '\xff'", "not UTF-8 at byte 8; save it as UTF-8"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {told}")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; check the path"):
        read_config_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read .*directory.*; check its permissions"):
        read_config_file(tmp_path)


def test_errors_are_one_line_with_place_problem_and_remedy():
    assert str(ForgeError("is\n  bad", where="steps", remedy="mend it")) == "steps: is bad; mend it"
    assert str(ForgeError("is bad")) == "is bad"
    assert [kind.exit_code for kind in (ForgeError, ConfigError, DataError, ResourceError)] == [1, 2, 3, 5]


def test_errors_cross_process_boundaries_whole():
    """Workers send them in memory; nothing of the house is ever pickled to a disk."""
    error = pickle.loads(pickle.dumps(DataError("is empty", where="a.txt", remedy="fill it")))
    assert type(error) is DataError and (error.what, error.where, error.remedy) == ("is empty", "a.txt", "fill it")
