"""Chat templates as transformers renders them, within the sandbox: every kind of expression and block they use."""

from __future__ import annotations

import threading
from collections.abc import Callable

import jinja2
import pytest

from flashvlm.errors import PromptError
from flashvlm.text.chat_template import ChatTemplate

EXPRESSIONS = """
messages | map(attribute='role') | join(', ')
messages | selectattr('role', 'equalto', 'user') | list | length
(messages | selectattr('role', 'in', ['user', 'tool']) | list)[-1].content
messages | rejectattr('role', 'equalto', 'system') | map(attribute='content') | first
messages | map(attribute='content') | map('upper') | list
messages[1:] | length
messages[::-1][0].role
messages[-1]['content'].split(' ')[0]
messages[0].content[:5] + messages[0].content[-3:]
messages[0].content.replace('e', '<e>').strip('. ')
messages[0].content | replace('e', '') | replace('a', 'b', 1)
messages[0].content | trim | title | length
' x '.strip() ~ 'y'.upper() ~ 1 ~ none ~ true ~ [1, 'a'] ~ {'k': 1.5}
messages | tojson
messages[0] | tojson(indent=2)
{'é': '<&>', 'b': [1, none, true]} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':'))
'a\\nb\\n\\nc' | indent(2) ~ ('a\\nb' | indent(4, true)) ~ ('a\\n\\nb' | indent('> ', blank=true))
{'b': 1, 'a': [2]} | dictsort
{'b': 2, 'a': 1} | dictsort(by='value', reverse=true) | list
{'b': 1, 'a': 2}.items() | list
{'b': 1, 'a': 2} | items | list
{'a': {'b': 1}}.a.b + {'a': 1}.get('a') + {}.get('x', 5)
[3, 1, 2] | sort | join('-') ~ ([3, 1] | sort(reverse=true) | list)
['b', 'A', 'a'] | unique | list ~ (['b', 'A'] | sort)
[1, 2, 3] | select('odd') | list ~ ([1, 2] | reject('even') | list)
[[1, 2], [3]] | map('first') | list ~ ([1, 2] | max) ~ ([1, 2] | min)
[1, 2] | reverse | list ~ ('abc' | reverse)
(1, 2) + (3,) ~ [1] + [2] ~ 'ab' * 3 ~ [0] * 2
7 // 2 ~ ',' ~ 7 % 3 ~ ',' ~ 2 ** 5 ~ ',' ~ 7 / 2 ~ ',' ~ -3 ~ ',' ~ +2
'5' | int + ('x' | int(7)) + ('12' | float | int) ~ (2.567 | round(1)) ~ (2.5 | round(0, 'ceil')) ~ (-3 | abs)
'%s is %05.1f, %(x)s' % {'x': 1} if false else '%s is %05.1f' % ('pi', 3.14159)
'%d-%d' | format(1, 2)
'<a>' | escape ~ ('<b>' | safe) ~ ('<c>' | e)
missing is defined ~ (missing is undefined) ~ (none is none) ~ ('a' is string) ~ (1 is number) ~ ({} is mapping)
[] is iterable ~ ('' is sequence) ~ (true is boolean) ~ (1 is integer) ~ (1.0 is float) ~ (4 is divisibleby(2))
missing | default('d') ~ ('' | default('e', true)) ~ (none | d('f'))
1 < 2 < 3 ~ ('a' in 'abc') ~ ('x' not in ['a', 'b']) ~ ('role' in messages[0]) ~ (1 == 1.0) ~ ([1] == [1])
1 if missing else 2
'yes' if messages[0].role == 'user' and not missing or false
namespace(a=1, b='c').b
range(3) | list ~ (range(5, 0, -2) | list)
dict(a=1, b=2).a ~ dict([('x', 1)]) ~ dict({'y': 2}, z=3)
'Hello'.startswith('He') ~ 'a,b'.split(',', 1) ~ 'x'.join(['a', 'b']) ~ 'a b'.rsplit(' ', 1) ~ 'abc'.find('c')
'aXbX'.lower().count('x') ~ 'a\\nb'.splitlines() ~ 'a'.isdigit() ~ 'ab'.partition('b') ~ 'ab'.removeprefix('a')
messages | string | length
messages[0].missing
messages.missing is defined
messages | length - 1
'abc' | first ~ ('abc' | last) ~ ('abc' | list)
"""

BLOCKS = """
{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}
{% for m in messages %}{{ loop.previtem.role }}{{ loop.nextitem is defined }}{{ loop.depth }}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.revindex }}{{ m.content }}{% else %}none{% endfor %}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% if loop.last %}{% continue %}{% endif %}-{% endfor %}
{% for c in 'abc' %}{{ c }}{{ loop.cycle('x', 'y') }}{{ loop.changed(c) }}{% break %}{% endfor %}
{% for x in [] %}{% else %}empty{% endfor %}{% for x in missing %}{% endfor %}
{% macro m(a, b='B') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m('x') }}{{ m(1, 2, 3, c=4) }}
{% macro m(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ m(*[1, 2]) }}{{ m(**{'b': 1, 'a': 2}) }}
{% macro w() %}<{{ caller('z') }}>{% endmacro %}{% call(y) w() %}{{ y }}!{% endcall %}
{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns }}
{% set x %}  <b>{{ messages[0].content }}</b>{% endset %}{{ x | trim }}{% set y | upper %}abc{% endset %}{{ y }}
{% filter upper %}abc{{ messages[0].role }}{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}
{% if tools %}{{ tools | unknown }}{% elif false %}{% else %}no tools{% endif %}
{% raw %}{{ not a variable }}{% endraw %}{# a comment #}{% print 'p', 1 %}
{%- set a, b = [1, 2] -%}   {{- a }}{{ b -}}
{% set q = messages | selectattr('role', 'equalto', 'user') %}{{ q | list | length }}{{ q | list | length }}
{{ raise_exception('no ' + messages[0].role) }}
{{ missing.attribute }}
{{ 'a' + 1 }}
"""


LINES = ["{{ " + line + " }}" for line in EXPRESSIONS.strip().splitlines()] + BLOCKS.strip().splitlines()


def outcome(render: Callable[[], str]) -> str:
    try:
        return render()
    except jinja2.TemplateSyntaxError:
        return "syntax error"
    except PromptError as error:
        return str(error)
    except Exception as error:
        return f"the chat template refuses these messages: {error}"


@pytest.mark.parity
@pytest.mark.parametrize("template", LINES)
def test_as_transformers_renders_it(template: str) -> None:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [
        {"role": "user", "content": "Where is the <cat>?"},
        {"role": "assistant", "content": "On the sofa. "},
        {"role": "user", "content": "And the dog?"},
    ]
    want = outcome(lambda: rendering.render_jinja_template([messages], chat_template=template)[0][0])
    assert outcome(lambda: ChatTemplate(template).render({"messages": messages})) == want


def test_a_long_conversation() -> None:
    template = """{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
    {{- '<|' + message.role + '|>' }}
    {%- for part in message.content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}
    {%- if not loop.last and messages[loop.index0 + 1].role == 'user' %}{{ '\n' }}{% endif %}
    {%- endfor %}"""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": f"{i} " * 150}]} for i in range(500)
    ]
    prompt = ChatTemplate(template).render({"messages": messages})
    assert prompt.count("<|user|>") == 250
    assert len(prompt) > 250_000


def test_several_threads() -> None:
    """Each render counts for itself: together they do more than one may."""
    costly = ChatTemplate("{% for i in range(100000) %}{% if i == 5 %}{{ i }}{% endif %}{% endfor %}")
    found: list[str] = []

    def render() -> None:
        found.extend(outcome(lambda: costly.render({})) for _ in range(3))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["5"] * 12
