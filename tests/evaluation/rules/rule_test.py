"""Names of rules, and the examples in the docstrings of the scorers."""

import doctest
import importlib
import pkgutil

import pytest

from moe_vlm_jax.evaluation import rules
from moe_vlm_jax.evaluation.rules import rule

MODULES = sorted(module.name for module in pkgutil.iter_modules(rules.__path__))


def test_an_unknown_rule_is_an_error_that_names_the_known_ones():
    rule.require("llava", benchmark="pope", known=("llava", "lmms_eval"))
    with pytest.raises(ValueError, match="rule='Llava' is not known for pope; use one of llava, lmms_eval"):
        rule.require("Llava", benchmark="pope", known=("llava", "lmms_eval"))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "rule"])
def test_the_examples_in_the_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"moe_vlm_jax.evaluation.rules.{name}"))
    assert result.attempted > 0 and result.failed == 0
