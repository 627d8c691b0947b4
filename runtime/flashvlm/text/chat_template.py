"""A chat template: a Jinja program that comes with a checkpoint, run so that all it can do is make a prompt.

Jinja's sandbox keeps a template from reaching Python's insides, but not from running for ever or filling the memory.
So its steps are counted. A loop or a macro costs as many as its body has nodes, which covers what takes the same time
whatever it is given. What takes longer for longer values goes through functions that charge for their size
(chat_meter.py, chat_filters.py). Both are put into the parsed template before Jinja compiles it, as filters that take
the context: those are not computed while compiling, and no template can name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from flashvlm.errors import PromptError
from flashvlm.text.chat_filters import (
    COMPARED,
    CONCAT,
    EACH,
    ENTER,
    FILTER_TABLE,
    FUNCTIONS,
    KEY,
    SEARCHED,
    SLICE,
    TEST_TABLE,
    printed,
)
from flashvlm.text.chat_meter import (
    CHARACTERS_A_STEP,
    MAX_DEPTH,
    MAX_INTEGER,
    STEPS_AN_ITEM,
    Meter,
    TooMuchWork,
    call_method,
    is_nested,
    is_safe,
    operate,
    words,
)

MAX_TEMPLATE = 128 << 10  # characters; published templates have up to 20,000, and parsing is 15 us a character
MAX_NODES = 10_000  # of the parsed template; published ones have up to 800, and compiling is 50 us a node

_NODES = words(
    """Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div Filter
    FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output Pair
    Pos Pow Scope Slice Sub Template TemplateData Test Tuple With"""
)
_DICT_ATTRIBUTES = frozenset(dir(dict))


class ChatTemplate:
    """A chat template, safe to render from several threads at once.

    Raises jinja2.TemplateError for what is no template, is too large, or uses what chat templates have no use for.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise jinja2.TemplateError(f"{len(source):,} characters, over the limit of {MAX_TEMPLATE:,}")
        environment = _Environment()
        try:
            tree = environment.parse(source)
            counted = _Counting().visit(tree)
            counted.set_environment(environment)
            code = environment.compile(counted)
        except jinja2.TemplateError:
            raise
        except (RecursionError, MemoryError):
            raise jinja2.TemplateError("blocks or expressions nested too deeply") from None
        except Exception as error:  # Python's own parser: SyntaxError, or ValueError for a number of 5,000 digits
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None
        self._template = jinja2.Template.from_code(environment, code, environment.globals)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt. Variables are of plain types: str, bool, list, dict.

        Raises PromptError if the template raises anything, or does more work than it may.
        """
        context = self._template.new_context(dict(variables))
        try:
            # Not Template.render: to tidy a traceback nobody sees, it compiles code for every frame.
            prompt = "".join(self._template.root_render_func(context))
            context.meter.charge_text(len(prompt))  # type: ignore[attr-defined]
        except TooMuchWork as error:
            reason = f"does too much work ({error}); export with another chat template"
        except RecursionError:
            reason = "does too much work (nested too deeply); export with another chat template"
        except Exception as error:  # a template is a program of the checkpoint: it may fail in any way
            said = " ".join(str(error).split())[:300]
            reason = f"refuses these messages: {said or type(error).__name__}"
        else:
            return prompt
        raise PromptError(f"the chat template {reason}")


# --- what a template is compiled to ----------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; here, its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Counting(NodeTransformer):
    """Puts the counting filters into a parsed template, and refuses nodes that are not on the list."""

    def __init__(self) -> None:
        self.steps = 0  # of the loop or macro body that is being visited
        self.nodes = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        kind = type(node).__name__
        self.steps += 1
        self.nodes += 1
        if kind not in _NODES:
            raise _refusal(node, f"{kind.lower()} has no place in a chat template")
        if self.nodes > MAX_NODES:
            raise _refusal(node, f"over {MAX_NODES:,} names, values and operations")
        return super().generic_visit(node, *args, **kwargs)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        self.steps += len(node.data) // CHARACTERS_A_STEP
        return self.generic_visit(node)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, str):
            self.steps += len(node.value) // CHARACTERS_A_STEP
        elif isinstance(node.value, int) and abs(node.value) > MAX_INTEGER:
            raise _refusal(node, f"a number beyond {MAX_INTEGER:,}")
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.recursive:
            raise _refusal(node, "a recursive loop has no place in a chat template")
        iterable, node.iter = node.iter, nodes.Const(None)
        outer, self.steps = self.steps, 0
        self.generic_visit(node)
        body, self.steps = self.steps, outer + 1
        node.iter = _filter(EACH, self.visit(iterable), nodes.Const(body))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:  # noqa: N802
        outer, self.steps = self.steps, 0
        self.generic_visit(node)
        enter = _filter(ENTER, nodes.Const(self.steps))
        node.body.insert(0, nodes.Output([enter], lineno=node.lineno))
        self.steps += outer
        return node

    visit_CallBlock = visit_Macro  # noqa: N815

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filter(EACH, node.dyn_args, nodes.Const(STEPS_AN_ITEM))
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _filter(EACH, node.dyn_kwargs, nodes.Const(STEPS_AN_ITEM))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(CONCAT, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(KEY, node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(SLICE, node.node, *(nodes.Const(None) if end is None else end for end in ends))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """Comparing with a constant takes as long as the constant is; looking into one likewise."""
        self.generic_visit(node)
        operand = node.ops[0]
        if len(node.ops) == 1 and (_is_constant(operand.expr) or _is_constant(node.expr)):
            if operand.op in ("in", "notin") and not _is_constant(operand.expr):
                operand.expr = _filter(SEARCHED, operand.expr)
            return node
        node.expr = _filter(COMPARED, node.expr)
        for operand in node.ops:
            name = SEARCHED if operand.op in ("in", "notin") else COMPARED
            operand.expr = _filter(name, operand.expr)
        return node


def _filter(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _is_constant(node: nodes.Expr) -> bool:
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _refusal(node: nodes.Node, what: str) -> jinja2.TemplateError:
    return jinja2.TemplateSyntaxError(what, node.lineno or 1)


# --- what it is rendered with ----------------------------------------------------------------------------------------


class _Context(Context):
    """The variables of one render, and what it has cost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = Meter()


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers' `apply_chat_template`, as far as chat templates use it."""

    context_class = _Context
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        # Not optimized: that would compute constants such as 'a' * 10**10 while compiling, where nothing counts.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=printed,
        )
        self.filters = FILTER_TABLE
        self.tests = TEST_TABLE
        self.globals = dict(FUNCTIONS)

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`: no published template uses it, and its fields are a language of their own."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return is_safe(obj, attr)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:  # the usual case, without an AttributeError first
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if is_nested(argument):  # a list is no key, and a tuple of tuples may take for ever to hash
            return self.undefined(obj=obj, name=type(argument).__name__)
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_loop_vars", None)  # Jinja's own, of use to functions that take the context
        kwargs.pop("_block_vars", None)
        meter = context.meter
        kind = type(obj)
        if kind is Macro:
            meter.depth += 1
            if meter.depth > MAX_DEPTH:
                raise TooMuchWork(f"limit {MAX_DEPTH} macros in macros")
            result = obj(context.eval_ctx, *args, **kwargs)
            meter.depth -= 1
            return result
        if kind is FunctionType and obj in FUNCTIONS.values():
            return obj(meter, *args, **kwargs)
        if kind in (BuiltinMethodType, MethodType):
            return call_method(meter, obj, *args, **kwargs)
        if isinstance(obj, Undefined):
            return obj(*args, **kwargs)  # raises what is undefined
        raise TypeError(f"{kind.__name__} cannot be called")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return operate(context.meter, operator, self.binop_table[operator], left, right)
