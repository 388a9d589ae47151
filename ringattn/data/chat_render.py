"""Renders a chat template in a process of its own: python -P chat_render.py < request.json > answer.json

A template is a program of unknown origin. jinja2's sandbox keeps it from Python's internals, and the limits of this
process bound its time and memory. The file imports nothing else of the package, so that the process starts fast.

The request has `template`, `variables` and `limits` (CPU seconds, bytes of memory). The answer has `text` or `error`.
"""

import datetime
import json
import resource
import sys
from contextlib import suppress
from typing import Any

DATE = datetime.datetime(2024, 7, 26)
"""The date that templates read as today, so that prompts do not change from day to day: the default of Llama 3.1."""


def render(template: str, variables: dict[str, Any]) -> str:
    """Returns the text of a template. The environment is that of transformers' apply_chat_template."""
    from jinja2 import Environment, TemplateError, __version__, ext, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, __version__.split(".")[:3])) < (3, 1, 6):  # earlier sandboxes have known escapes
        raise ImportError(f"jinja2 {__version__} is too old")

    class Generation(ext.Extension):
        """Accepts the tag `generation`, which marks the assistant's text and changes nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return DATE.strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template).render(variables)


def main() -> None:
    request = json.load(sys.stdin)
    seconds, size = request["limits"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(ValueError):  # macOS cannot limit it
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except ImportError:
        answer = {"missing": "jinja2"}
    except Exception as error:  # a template can raise anything
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
