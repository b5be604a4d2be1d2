"""How do tokens form a template? Recursive descent: one method for each rule of the grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from refollama.errors import TemplateError
from refollama.text.gotemplate.functions import FUNCTIONS
from refollama.text.gotemplate.lexer import Token, error_at, lex
from refollama.text.gotemplate.literals import CONSTANTS, constant
from refollama.text.gotemplate.nodes import (
    MAX_DEPTH,
    ROOT,
    Body,
    Break,
    Call,
    Choice,
    Continue,
    Dot,
    Expression,
    Fields,
    Insert,
    Jump,
    Literal,
    Node,
    Pipe,
    Print,
    Range,
    Text,
    Variable,
)

MAX_VARIABLES = 256  # in one template
KEYWORDS = frozenset(
    ("if", "else", "end", "range", "with", "break", "continue", "define", "template", "block")
)


class Parser:
    """Tokens → nodes, by recursive descent: one method for each rule of the grammar."""

    def __init__(self, source: str) -> None:
        self.names: set[str] = set()
        self.defined: dict[str, Body] = {}
        self._source = source
        self._tokens = list(lex(source))
        self._next = 0
        self._depth = 0
        self._loops = 0  # ranges around this place
        self._scope = {"$": ROOT}  # the variables that can be seen here, with their slots
        self._slots = 1

    def whole(self) -> Body:
        """template = { text | action } eof"""
        body, word = self._body()
        if word.kind != "eof":
            raise self._error(word, f"unexpected {{{{{word.text}}}}}")
        return body

    # ── blocks ──

    def _body(self) -> tuple[Body, Token]:
        """Nodes, and the word that ended them: end, else, or the end of the template."""
        self._enter()
        scope, self._scope = self._scope, dict(self._scope)
        nodes: list[Node] = []
        while (token := self._take()).kind != "eof":
            if token.kind == "text":
                nodes.append(Text(token.at, token.text))
                continue
            if self._peek().text in ("end", "else") and self._peek().kind == "name":
                token = self._take()
                break
            nodes += self._action()
        self._scope = scope
        self._depth -= 1
        return tuple(nodes), token

    def _action(self) -> Iterable[Node]:
        """What stands between braces; {{ define }} leaves nothing here."""
        token = self._peek()
        rules: Mapping[str, Callable[[Token], Iterable[Node]]] = {
            "if": self._choice,
            "with": self._choice,
            "range": self._range,
            "break": self._jump,
            "continue": self._jump,
            "template": self._template,
            "block": self._block,
            "define": self._define,
        }
        if token.kind == "name" and token.text in rules:
            return rules[token.text](self._take())
        pipe = self._pipe()
        self._close()
        return [Print(token.at, pipe)]

    def _choice(self, word: Token) -> Iterable[Node]:
        """if pipe }} … { {{ else if pipe }} … } [ {{ else }} … ] {{ end }}"""
        scope, self._scope = self._scope, dict(self._scope)
        branches = []
        while True:
            pipe = self._pipe()
            self._close()
            body, end = self._body()
            branches.append((pipe, body))
            if end.text != "else" or self._peek().text != word.text:
                break
            self._take()
        otherwise = self._otherwise(word, end)
        self._scope = scope
        return [Choice(word.at, tuple(branches), otherwise, moves_dot=word.text == "with")]

    def _range(self, word: Token) -> Iterable[Node]:
        """range [ $i, $x := ] pipe }} … [ {{ else }} … ] {{ end }}"""
        scope, self._scope = self._scope, dict(self._scope)
        pipe = self._pipe(most_names=2)
        self._close()
        self._loops += 1
        body, end = self._body()
        self._loops -= 1
        otherwise = self._otherwise(word, end)
        self._scope = scope
        bare = Pipe(pipe.at, pipe.first, pipe.calls)
        return [Range(word.at, bare, pipe.slots, body, otherwise)]

    def _otherwise(self, word: Token, end: Token) -> Body:
        """The rest of a block, from its {{ else }} or {{ end }} on."""
        body: Body = ()
        if end.text == "else" and end.kind == "name":
            self._close()
            body, end = self._body()
        if end.kind == "eof":
            raise self._error(word, f"no {{{{end}}}} for this {{{{{word.text}}}}}")
        if end.text != "end":
            raise self._error(end, f"a second {{{{else}}}} in one {{{{{word.text}}}}}")
        self._close()
        return body

    def _jump(self, word: Token) -> Iterable[Node]:
        if not self._loops:
            raise self._error(word, f"{{{{{word.text}}}}} outside a {{{{range}}}}")
        self._close()
        return [Jump(word.at, Break if word.text == "break" else Continue)]

    # ── templates in templates ──

    def _template(self, word: Token) -> Iterable[Node]:
        """template "name" [ pipe ]"""
        name = self._name()
        pipe = None if self._peek().kind == "close" else self._pipe()
        self._close()
        return [Insert(word.at, name, pipe)]

    def _block(self, word: Token) -> Iterable[Node]:
        """block "name" pipe }} … {{ end }}: define, and insert here"""
        name, pipe = self._name(), self._pipe()
        self._close()
        self.defined[name] = self._separate(word)
        return [Insert(word.at, name, pipe)]

    def _define(self, word: Token) -> Iterable[Node]:
        """define "name" }} … {{ end }}"""
        if self._depth > 1:
            raise self._error(word, "{{define}} inside another block")
        name = self._name()
        self._close()
        self.defined[name] = self._separate(word)
        return []

    def _separate(self, word: Token) -> Body:
        """A body that sees no variables but its own."""
        outer = self._scope, self._slots, self._loops
        self._scope, self._slots, self._loops = {"$": ROOT}, 1, 0
        body, end = self._body()
        if end.text != "end":
            raise self._error(word, f"no {{{{end}}}} for this {{{{{word.text}}}}}")
        self._close()
        self._scope, self._slots, self._loops = outer
        return body

    def _name(self) -> str:
        token = self._take()
        if token.kind not in ("string", "raw"):
            raise self._error(token, f"expected the name of a template in quotes, not {token.text}")
        return str(self._literal(token).constant)

    # ── pipes ──

    def _pipe(self, most_names: int = 1) -> Pipe:
        """[ $x := ] command { | command }"""
        at = self._peek().at
        names, declares = self._assigned(most_names)
        first = self._command()
        calls = []
        while self._peek().text == "|":
            self._take()
            calls.append(self._call_behind_pipe())
        slots = tuple(self._slot(name, declares) for name in names)
        return Pipe(at, first, tuple(calls), slots)

    def _assigned(self, most: int) -> tuple[list[Token], bool]:
        """The variables in front of := or =, and whether they are new; none if there are none."""
        ahead = self._tokens[self._next : self._next + 4]
        length = 3 if len(ahead) > 1 and ahead[1].text == "," else 1
        if ahead[0].kind != "variable" or ahead[length].text not in (":=", "="):
            return [], False
        names = ahead[:length:2]
        if len(names) > most or names[-1].kind != "variable":
            raise self._error(names[-1], "no variable, or not so many, can be set here")
        self._next += length + 1
        return names, ahead[length].text == ":="

    def _slot(self, name: Token, declares: bool) -> int:
        """Where a variable's value is kept; a declared one gets a new place."""
        if declares and self._slots < MAX_VARIABLES:
            self._scope[name.text] = self._slots
            self._slots += 1
        elif declares:
            raise self._error(name, f"more than {MAX_VARIABLES} variables")
        elif name.text not in self._scope:
            raise self._error(name, f"undefined variable {name.text}")
        return self._scope[name.text]

    def _command(self) -> Expression:
        """function { operand } | operand"""
        token = self._peek()
        if self._is_function(token):
            return self._call(piped=0)
        operand = self._operand()
        if not self._at_end_of_command():
            raise self._error(token, f"{token.text} is no function and takes no arguments")
        if token.text == "nil" and token.kind == "name":
            raise self._error(token, "nil is not a command")
        return operand

    def _call_behind_pipe(self) -> Call:
        token = self._peek()
        if not self._is_function(token):
            raise self._error(token, f"a pipe must lead to a function, not to {token.text}")
        return self._call(piped=1)

    def _call(self, piped: int) -> Call:
        """A function with its arguments, `piped` of which come through the pipe."""
        token = self._take()
        self._check_gap(token)
        args = []
        while not self._at_end_of_command():
            args.append(self._operand())
        return self._checked(token, tuple(args), piped)

    def _checked(self, token: Token, args: Sequence[Expression], piped: int = 0) -> Call:
        function = FUNCTIONS[token.text]
        given = len(args) + piped
        if not function.least <= given <= function.most:
            wanted = function.least if given < function.least else function.most
            raise self._error(token, f"{token.text} wants {wanted} arguments, not {given}")
        return Call(token.at, token.text, tuple(args))

    # ── operands ──

    def _operand(self) -> Expression:
        """( pipe ) | literal | . | $x | .Field | function, each with .Fields behind it"""
        token = self._take()
        base = self._term(token)
        names = [token.text[1:]] if token.kind == "field" else []
        while self._peek().kind == "field" and not self._peek().spaced:
            names.append(self._take().text[1:])
        if names and isinstance(base, Literal | Call):
            raise self._error(token, f"{token.text} has no fields")
        self._check_gap(token)
        self.names.update(names)
        return Fields(token.at, base, tuple(names)) if names else base

    def _term(self, token: Token) -> Expression:
        if token.text == "(" and token.kind == "mark":
            return self._parenthesised(token)
        if token.kind == "field" or (token.kind, token.text) == ("mark", "."):
            return Dot(token.at)
        if token.kind == "variable":
            return Variable(token.at, self._slot(token, declares=False))
        if token.kind == "name" and token.text in FUNCTIONS:
            return self._checked(token, ())
        return self._literal(token)

    def _parenthesised(self, opening: Token) -> Expression:
        self._enter()
        pipe = self._pipe(most_names=0)
        if self._take().text != ")":
            raise self._error(opening, "unclosed parenthesis")
        self._depth -= 1
        return pipe

    def _literal(self, token: Token) -> Literal:
        if token.kind == "name" and token.text not in (*KEYWORDS, *CONSTANTS):
            raise self._error(token, f'function "{token.text}" is not defined')
        try:
            return Literal(token.at, constant(token))
        except ValueError as error:
            raise self._error(token, str(error)) from None

    # ── tokens ──

    def _peek(self) -> Token:
        return self._tokens[min(self._next, len(self._tokens) - 1)]

    def _take(self) -> Token:
        token = self._peek()
        self._next += 1
        return token

    def _close(self) -> None:
        token = self._take()
        if token.kind != "close":
            raise self._error(token, f"unexpected {token.text}")

    def _is_function(self, token: Token) -> bool:
        return token.kind == "name" and token.text in FUNCTIONS

    def _at_end_of_command(self) -> bool:
        token = self._peek()
        return token.kind in ("close", "eof") or (token.kind == "mark" and token.text in "|)")

    def _check_gap(self, before: Token) -> None:
        """Two operands need a space between them."""
        if not self._at_end_of_command() and not self._peek().spaced:
            raise self._error(self._peek(), f"unexpected {self._peek().text} behind {before.text}")

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(self._peek(), f"nested more than {MAX_DEPTH} deep")

    def _error(self, token: Token, problem: str) -> TemplateError:
        return error_at(self._source, token.at, problem)
