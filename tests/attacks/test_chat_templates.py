"""Chat templates that would run for ever, fill the memory or reach out: refused in one line, after bounded work.

Those that might do harm are rendered in a child with 512 MiB of memory. Without limits most of them take all memory,
or hours. What templates are for is in tests/runtime/test_chat_template.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import jinja2
import pytest

from flashvlm.errors import PromptError
from flashvlm.text import chat_meter
from flashvlm.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]

CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))
from flashvlm.text.chat_template import ChatTemplate
from flashvlm.errors import PromptError
messages = json.loads(sys.argv[1])
for name, template in json.load(sys.stdin).items():
    print(json.dumps([name, None]), flush=True)  # so that a crash has a name
    start = time.monotonic()
    try:
        outcome = "rendered: " + ChatTemplate(template).render({"messages": messages})[:100]
    except PromptError as error:
        outcome = str(error)
    print(json.dumps([name, outcome, time.monotonic() - start]), flush=True)
"""


def loop(body: str, items: str = "range(100000)") -> str:
    return "{% for i in " + items + " %}" + body + "{% endfor %}"


def repeat(step: str, start: str = "'a'", times: int = 64, end: str = "") -> str:
    """``ns.x`` grows from ``start`` by ``step``."""
    grown = loop("{% set ns.x = " + step + " %}", f"range({times})")
    return "{% set ns = namespace(x=" + start + ") %}" + grown + end


def big(text: str, end: str) -> str:
    """``big`` is some 500,000 characters of a text of two."""
    return repeat("ns.x + ns.x", repr(text), 18, "{% set big = ns.x %}" + end)


def shared(end: str, pair: str = "[ns.x, ns.x]", start: str = "[1]") -> str:
    """``a`` and ``b`` are lists of two lists of two lists ...: 40 of them, but 2 ** 40 to whoever prints them."""
    return repeat(pair, start, 40, "{% set a = ns.x %}") + repeat(pair, start, 40, "{% set b = ns.x %}" + end)


GROWING = {
    "concatenation": repeat("ns.x ~ ns.x"),
    "addition": repeat("ns.x + ns.x"),
    "lists": repeat("ns.x + ns.x", "[1]"),
    "tuples": repeat("ns.x + ns.x", "(1,)"),
    "set blocks": repeat(
        "ns.x", end=loop("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "range(64)")
    ),
    "filter blocks": repeat(
        "ns.x",
        end=loop("{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}"),
    ),
    "replace": repeat("ns.x.replace('a', 'aa')"),
    "replace nothing": repeat("ns.x.replace('', 'aaaaaaa')"),
    "replace filter": repeat("ns.x | replace('a', 'aa')"),
    "join": repeat("ns.x.join(ns.x)", "'aaaa'"),
    "join filter": repeat("[ns.x, ns.x] | join(ns.x)"),
    "upper case": repeat("ns.x.upper() + ns.x.upper()", "'\u0390'"),
    "escaping": repeat("ns.x + '&&&&&&&&' + (ns.x ~ '')", "'&' | safe"),
    "list of texts": repeat("ns.x + [big[:99999] | list]", "[]", 100_000).replace("big", "('€b' * 50000)"),
    "held texts": big("€b", repeat("ns.x + [big + i | string]", "[]", 100_000)),
    "held ranges": repeat("ns.x + [range(100000) | list]", "[]", 100_000),
    "held literals": repeat("[ns.x, [" + "0," * 4000 + "]]", "[]", 100_000),
    "held lines": big("€\n", repeat("ns.x + [big[:150000].split('\\n')]", "[]", 100_000)),
    "dictionaries": repeat("dict(ns.x, **{i | string: 1})", "{}", 100_000),
}

AT_ONCE = {
    "times": "{{ 'a' * 10**10 }}",
    "times, constant": "{% set x = 'a' * 10000000000 %}",
    "times a list": "{{ [1] * 10**10 }}",
    "times lists": "{{ [[1] * 100000] * 100000 }}",
    "power": "{{ 10 ** (10**8) }}",
    "power of squares": repeat("ns.x * ns.x", "3"),
    "range": "{{ range(10**9) | list | length }}",
    "range in a loop": "{% for i in range(10**9) %}{% endfor %}",
    "number of digits": "{{ ('9' * 4000) | int * 2 }}",
    "number of another base": "{{ ('f' * 500000) | int(base=16) * 2 }}",
    "colliding keys": "{{ range(0, 100000 * (2**61 - 1), 2**61 - 1) | unique | list | length }}",
    "indent": "{{ 'a\\nb' | indent(10**9) }}",
    "indent of lines": big("\n\n", "{{ big | indent(1000, true, true) }}"),
    "indent by text": big("a\n", "{{ big | indent(big) }}"),
    "json indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "json indent of many": "{{ range(90000) | list | tojson(indent=1000) }}",
    "json separators": big("ab", "{{ range(90000) | list | tojson(separators=(big, big)) }}"),
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1 }}",
    "percent, named": big("ab", "{{ ('%(a)s' * 100) % {'a': big} }}"),
    "percent of a test": "{{ '%999999999d' is odd }}",
    "percent of another": "{{ '%999999999d' is divisibleby(3) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}",
    "format_map method": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "round down": "{{ 5 | round(-10**9) }}",
    "round text": "{{ 'aaaa' | round(9, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "joined map": "{{ range(100000) | map('string') | map('replace', '', 'x' * 1000) | join }}",
    "date width": "{{ strftime_now('%1000000000Y') }}",
    "date length": "{{ strftime_now('%c' * 500000) }}",
    **{f"method {call}": "{{ 'a'." + call + " }}" for call in ("ljust(10**9)", "center(10**9)", "zfill(10**9)")},
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "attribute of many names": "{{ messages | map(attribute='a.' * 400000) | list }}",
}

LASTING = {
    "loops": loop(loop("")),
    "loops of text": loop(loop(loop("abc"))),
    "loops over text": big("ab", loop(loop("", "big"), "big")),
    "loops that break": loop(loop("{% break %}")),
    "loops with a condition": loop("{% for j in range(100000) if false %}{% endfor %}"),
    "loops over nothing": loop(loop("", "range(100000) | select('none')")),
    "length of a loop": loop(loop("{{ loop.length }}{% break %}", "range(100000) | select")),
    "macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro twice in itself": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(45) }}",
    "call block in itself": "{% macro m() %}{{ caller() }}{% endmacro %}"
    "{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
    "many arguments": big("ab", "{% macro m() %}{{ varargs | length }}{% endmacro %}" + loop("{{ m(*big) }}")),
    "strip": big("aa", "{{ big.strip('b' * 400000 + 'a') }}"),
    "trim": big("aa", "{{ big | trim('b' * 400000 + 'a') }}"),
    "search from the right": big("aa", "{{ big.rfind('ab' + big[:200000]) }}"),
    "split from the right": big("aa", "{{ big.rsplit('ab' + big[:200000]) | length }}"),
    "search": big("aa", loop("{{ big.find(big[:500] + 'b' + big[:500]) }}")),
    "contained": big("aa", loop("{{ (big[:500] + 'b' + big[:500]) in big }}")),
    "title case": big("a ", loop("{{ big | title | length }}")),
    "split": big("a ", loop("{{ big.split() | length }}")),
    "output": loop("a" * 100),
    "output of text": big("ab", loop("{{ big }}")),
}

# What would go through 2 ** 40 lists to print, compare or hash them.
SHARED_EXPRESSIONS = """
a
a ~ ''
a == b
a in [b, 1]
a < b
a is eq(b)
{a: 1}
{}.get(a)
dict([(a, 1)]).x
a | tojson
a | string
a | join
[a, b] | unique | list
[a, b] | sort
[a, b] | max
{'x': a, 'y': b} | dictsort(by='value')
'%s' % [a]
'%s' | format(a)
raise_exception(a)
strftime_now(a)
messages | map(a) | list
messages | selectattr('role', a) | list
messages | sort(attribute=a)
namespace(x=a)
namespace({a: 1})
{'x': a}.items()
{'x': 1}.keys() - a
ns
5 | round(1, a)
a | upper
messages[0][a].x
"""
SHARED = {
    f"{kind} {expression}": shared("{{ " + expression + " }}", pair, start)
    for expression in SHARED_EXPRESSIONS.strip().splitlines()
    for kind, pair, start in (("list", "[ns.x, ns.x]", "[1]"), ("tuple", "(ns.x, ns.x)", "(1,)"))
}

# As many nested calls to print, compare or free; for generators in generators a stack may have no room for them.
NESTED = {
    "maps of maps": repeat("ns.x | map('string')", "messages", 50_000, "{{ ns.x | list | length }}"),
    "selections of selections": repeat("ns.x | select", "messages", 50_000),
    "lists of lists": repeat("[ns.x]", "1", 30_000, "{{ ns.x }}"),
    "tuples of tuples": repeat("(ns.x,)", "1", 30_000, "{{ ns.x | tojson }}"),
    "dictionaries of dictionaries": repeat("{'a': ns.x}", "1", 30_000, "{{ ns.x == messages }}"),
}
FINE = {"maps of maps", "selections of selections"}  # they are lists here, which is bounded work


def rendered_in_a_child(templates: dict[str, str]) -> dict[str, str]:
    """What came of each. None of them may take more than some seconds, which in a child is not ours to wait for."""
    command = [sys.executable, "-c", CHILD, json.dumps(MESSAGES)]
    ran = subprocess.run(command, input=json.dumps(templates), capture_output=True, text=True, timeout=300, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:], lines[-1:])
    ended = [line for line in lines if line[1]]
    assert [name for name, *_ in ended] == list(templates)
    for name, outcome, seconds in ended:
        assert "\n" not in outcome, name
        assert len(outcome) < 400, name
        assert seconds < 30, name
    return {name: outcome for name, outcome, _ in ended}


@pytest.mark.parametrize("table", [GROWING, AT_ONCE, LASTING, NESTED], ids=["growing", "at once", "lasting", "nested"])
def test_too_much_work(table: dict[str, str]) -> None:
    for name, outcome in rendered_in_a_child(table).items():
        assert outcome.startswith("rendered: " if name in FINE else "the chat template "), (name, outcome)


def test_lists_that_share_their_items() -> None:
    for name, outcome in rendered_in_a_child(SHARED).items():
        assert outcome.startswith("the chat template ") or name.endswith("messages[0][a].x"), (name, outcome)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (GROWING["addition"], "limit 1,000,000 characters of text"),
        (AT_ONCE["times"], "limit 1,000,000 characters of text"),
        (GROWING["lists"], "limit 100,000 items"),
        (AT_ONCE["power"], "limit 64 of an exponent"),
        (AT_ONCE["power of squares"], "limit 1,000,000,000,000,000 of a number"),
        (AT_ONCE["range"], "limit 100,000 items of a range"),
        (AT_ONCE["percent width"], "limit 1000 of the width of a format"),
        (LASTING["loops"], "limit 2,000,000 steps"),
        (LASTING["macro in itself"], "limit 50 macros in macros"),
        (NESTED["lists of lists"], "limit 50 lists in lists"),
    ],
)
def test_the_limit_is_named(template: str, words: str) -> None:
    with pytest.raises(PromptError) as refusal:
        ChatTemplate(template).render({"messages": MESSAGES})
    assert str(refusal.value).startswith("the chat template does too much work (limit ")
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("); export with another chat template")


def test_a_deadline_for_slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_meter, "MAX_SECONDS", 0.0)
    with pytest.raises(PromptError, match=r"too much work \(limit 0 seconds\)"):
        ChatTemplate("{{ messages | length }}{% for i in range(9) %}{{ i }}{% endfor %}").render({"messages": MESSAGES})


# --- templates that are refused before they run ----------------------------------------------------------------------

MALFORMED: dict[str, tuple[str, str]] = {
    "too long": ("a" * 200_000, "200,000 characters, over the limit of 131,072"),
    "too many values": ("{{ [" + "1," * 20_000 + "] }}", "over 10,000 names, values and operations"),
    "chain of additions": ("{{ a" + "+a" * 10_000 + " }}", "nested too deeply"),
    "chain of attributes": ("{{ a" + ".a" * 10_000 + " }}", "nested too deeply"),
    "chain of filters": ("{{ a" + "|upper" * 3000 + " }}", "nested too deeply"),
    "parentheses": ("{{ " + "(" * 50_000, "nested too deeply"),
    "brackets": ("{{ " + "[" * 50_000, "nested too deeply"),
    "negations": ("{{ " + "not " * 30_000 + "1 }}", "nested too deeply"),
    "signs": ("{{ " + "-" * 50_000 + "1 }}", "nested too deeply"),
    "conditions": ("{% if a %}" * 10_000, "nested too deeply"),
    "else ifs": ("{% if a %}" + "{% elif a %}" * 4000 + "{% endif %}", "nested too deeply"),
    "loops in loops": ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
    "ifs in ifs": ("{% if a %}" * 120 + "{% endif %}" * 120, ""),
    "parameter twice": ("{% macro m(a, a) %}{% endmacro %}", "SyntaxError"),
    "number of digits": ("{{ " + "9" * 100_000 + " }}", "ValueError"),
    "hexadecimal number": ("{{ 0x" + "f" * 100_000 + " % 7 }}", "a number beyond 1,000,000,000,000,000"),
    "recursive loop": ("{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}", "a recursive loop has no place"),
    "block": ("{% block a %}{{ self.a() }}{% endblock %}", "block has no place in a chat template"),
    "include": ("{% include '/etc/passwd' %}", "include has no place"),
    "import": ("{% import 'os' as os %}", "import has no place"),
    "import of names": ("{% from 'os' import path %}", "fromimport has no place"),
    "extends": ("{% extends 'x' %}", "extends has no place"),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", "has no place"),
    "filter batch": ("{{ 'abc' | batch(10**9, 'x') | list }}", "No filter named 'batch'"),
    "filter slice": ("{{ 'abc' | slice(10**9) | list }}", "No filter named 'slice'"),
    "filter center": ("{{ 'abc' | center(10**9) }}", "No filter named 'center'"),
    "filter wordwrap": ("{{ 'abc' | wordwrap(1) }}", "No filter named 'wordwrap'"),
    "filter attr": ("{{ '' | attr('__class__') }}", "No filter named 'attr'"),
    "filter pprint": ("{{ messages | pprint }}", "No filter named 'pprint'"),
    "loop variable": ("{% for loop in [1] %}{% endfor %}", "loop"),
    "unknown tag": ("{% " + "x" * 1000 + " %}", "unknown tag"),
}


@pytest.mark.parametrize(("template", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(template: str, words: str) -> None:
    with pytest.raises(jinja2.TemplateError) as refusal:
        ChatTemplate(template)
    assert words in str(refusal.value)


# --- templates that reach for what is not theirs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "''['__class__'].x",
        "messages.append(1)",
        "messages.__class__.x",
        "messages[0].update({'a': 1})",
        "messages[0].clear()",
        "messages[0].setdefault('a', 1)",
        "messages[0].fromkeys('abc')",
        "messages[0].keys.__self__.x",
        "raise_exception.__globals__.x",
        "namespace.__init__.x",
        "dict.fromkeys([1])",
        "range.__self__.x",
        "cycler.__init__.x",
        "joiner()",
        "self.__init__.x",
        "self._TemplateReference__context.x",
        "loop.__class__.x",
        "ns._Namespace__attrs.x",
        "m.__call__.x",
        "m._func.x",
        "(messages | map('string')).gi_frame.x",
        "'{0.__class__}'.format(1)",
        "''.encode().x",
        "''.translate({}).x",
        "messages | map('for (counted)', 1) | first | attr('x')",
    ],
)
def test_reaching_out(expression: str) -> None:
    template = (
        "{% set ns = namespace(a=1) %}{% macro m() %}{% endmacro %}"
        "{% for q in [1] %}{{ loop.index }}{% if true %}{{ (" + expression + ") }}{% endif %}{% endfor %}"
    )
    with pytest.raises(PromptError, match="the chat template refuses these messages: "):
        ChatTemplate(template).render({"messages": MESSAGES})
    assert MESSAGES[0].keys() == {"role", "content"}


@pytest.mark.parametrize("value", ["'\\n' * 1000 + 'x' * 100000", "'\u202e' * 1000", "''", "5", "messages"])
def test_what_a_template_says_is_one_short_line(value: str) -> None:
    with pytest.raises(PromptError, match="refuses these messages: ") as refusal:
        ChatTemplate("{{ raise_exception(" + value + ") }}").render({"messages": MESSAGES})
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 4000
