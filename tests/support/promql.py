"""What an expression of PromQL asks for: the metrics, their labels, and the labels of what comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import promql_parser as promql

TARGET = frozenset({"job", "instance"})
"""The labels that Prometheus gives to whatever it reads from a server."""
Labels = frozenset[str]
Known = Mapping[str, Mapping[str, frozenset[str]]]
"""By name of a metric: its labels, and of each the values that were seen."""
_SETS = {"and", "or", "unless"}


class WrongQueryError(Exception):
    """An expression that asks for what there is not, or joins what never meets."""


def labels_of(text: str, known: Known) -> Labels:
    """Return the labels of an expression's result; raises WrongQueryError if there is no such thing."""
    try:
        expression = promql.parse(text)
    except ValueError as error:
        raise WrongQueryError(f"{error}: {text}") from None
    found = _labels(expression, known)
    if found is None:
        raise WrongQueryError(f"a number: {text}")
    return found


def _labels(node: Any, known: Known) -> Labels | None:
    """Return the labels of a part's result; None: it is a number or a text."""
    match node:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _selected(node, known)
        case promql.MatrixSelector():
            return _selected(node.vector_selector, known)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, known)
        case promql.AggregateExpr():
            inner = _labels(node.expr, known) or frozenset()
            by = frozenset(node.modifier.labels) if node.modifier else frozenset()
            if node.modifier and node.modifier.type != promql.AggModifierType.By:
                raise WrongQueryError("only `by` is understood")
            _hold(by <= inner, f"no label {sorted(by - inner)} in {node.expr}")
            return by
        case promql.Call():
            found = [labels for labels in (_labels(one, known) for one in node.args) if labels is not None]
            if node.func.name != "histogram_quantile":
                return found[0] if found else frozenset()
            _hold("le" in found[0], f"no buckets in {node}")
            return found[0] - {"le"}
        case promql.BinaryExpr():
            return _joined(node, known)
    raise WrongQueryError(f"{type(node).__name__} is not understood")


def _selected(node: Any, known: Known) -> Labels:
    _hold(node.name in known, f"no metric {node.name}")
    labels = known[node.name]
    if ":" in node.name:  # what a rule has recorded keeps only the labels of its expression
        _hold(not node.matchers.matchers, f"values of {node.name} are not known")
        return frozenset(labels)
    for matcher in node.matchers.matchers:
        if matcher.name in TARGET:
            continue
        _hold(matcher.name in labels, f"no label {matcher.name} of {node.name}")
        seen = labels[matcher.name]
        wanted = matcher.value.split("|") if "~" in str(matcher) else [re.escape(matcher.value)]
        for value in wanted:
            _hold(any(re.fullmatch(value, s) for s in seen), f"no {matcher.name} like {value} of {node.name}")
    return frozenset(labels) | TARGET


def _joined(node: Any, known: Known) -> Labels | None:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if left is None or right is None:
        return right if left is None else left
    matching = node.modifier.matching if node.modifier else None
    if matching is None:
        on = left | right
    elif matching.type == promql.LabelModifierType.Include:
        on = frozenset(matching.labels)
    else:
        on = (left | right) - frozenset(matching.labels)
    _hold(on <= left and on <= right, f"{sorted(left)} and {sorted(right)} never meet in {node}")
    if str(node.op) in _SETS:
        return left
    many = node.modifier is not None and node.modifier.card == promql.VectorMatchCardinality.ManyToOne
    _hold(right == on and (many or left == on), f"several of one side meet one of the other in {node}")
    return left


def _hold(fine: bool, sentence: str) -> None:
    if not fine:
        raise WrongQueryError(sentence)
