"""A calculator for the policy of recipes/calculator.yaml."""

import ast
import operator

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """Calculate an arithmetic expression.

    Args:
        expression: Numbers with + - * / and parentheses, such as "12 * (3 + 4)".
    """
    if len(expression) > 200:
        raise ValueError("more than 200 characters")
    return f"{_value(ast.parse(expression, mode='eval').body):.10g}"


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError("only numbers, + - * / and parentheses")
