"""An interpreter for the C++ of llama.cpp's loaders and graphs.

It runs what decides about rotation and passes over the rest: a name that nothing defines is
UNKNOWN, as is whatever is computed from it. Where a condition is unknown, both branches run, and a
statement that cannot be parsed is an error. Assertions and exceptions count where their condition
names something that bears on rotation. Floating-point numbers are f64, but for literals.
"""

import math
import re
import struct

TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>0x[0-9a-fA-F]+[uUlL]*|(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)[fFuUlL]*)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<op>::|->|\+\+|--|<<=|>>=|<<|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|/=|%=|\|=|&=|\.\.\.|[-+*/%<>=!&|^~?:;,.(){}\[\]\#])
    )""",
    re.VERBOSE,
)
TYPES = {
    "int", "float", "double", "bool", "char", "unsigned", "long", "size_t", "uint32_t", "int32_t",
    "uint64_t", "int64_t", "uint8_t", "int8_t", "uint16_t", "const", "llama_pos", "llama_rope_type",
    "llama_expert_gating_func_type", "llm_expert_gating_func_type", "void", "auto", "ggml_type",
}
CASTS = {"static_cast", "reinterpret_cast", "const_cast", "dynamic_cast"}
BINARY = [
    ["||"], ["&&"], ["|"], ["^"], ["&"], ["==", "!="], ["<", ">", "<=", ">="], ["<<", ">>"],
    ["+", "-"], ["*", "/", "%"],
]
ASSIGN = {"=", "+=", "-=", "*=", "/=", "|=", "&=", "%="}


class Unknown:
    def __repr__(self):
        return "UNKNOWN"


UNKNOWN = Unknown()


class Refused(Exception):
    """The program throws or aborts."""


class Unparsed(Exception):
    pass


class Break(Exception):
    pass


class Continue(Exception):
    pass


class Return(Exception):
    def __init__(self, value):
        self.value = value


def strip(text):
    """The source without comments and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*', lambda m: m[1] or "", text)
    return re.sub(r"^[ \t]*#[^\n]*(?:\\\n[^\n]*)*", "", text, flags=re.MULTILINE)


def tokens(text):
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise Unparsed(text[position : position + 60])
        found.append(match[match.lastgroup])
        position = match.end()
    return found


def body(text, start):
    """The text between the brace at or after `start` and its match, and the end."""
    opening = text.index("{", start)
    depth = 0
    for match in re.finditer(r'"(?:\\.|[^"\\])*"|[{}]', text[opening:]):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : opening + match.start()], opening + match.end()
    raise Unparsed("braces")


class Parser:
    def __init__(self, text):
        self.tokens = tokens(text)
        self.at = 0

    def peek(self, ahead=0):
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def take(self, expected=None):
        token = self.peek()
        if token is None or expected is not None and token != expected:
            near = " ".join(self.tokens[max(0, self.at - 12) : self.at + 8])
            raise Unparsed(f"{expected!r} expected near: {near}")
        self.at += 1
        return token

    def accept(self, token):
        if self.peek() == token:
            self.at += 1
            return True
        return False

    def skip_angles(self):
        """Past `<...>`; False if there is none that closes like a list of template arguments."""
        place, depth = self.at, 0
        while place < len(self.tokens):
            token = self.tokens[place]
            if token == "<":
                depth += 1
            elif token == ">":
                depth -= 1
                if depth == 0:
                    self.at = place + 1
                    return True
            elif token in {";", "{", "}", "&&", "||"}:
                return False
            place += 1
        return False

    def name(self):
        name = self.take()
        while self.peek() == "::" and re.match(r"[A-Za-z_]", self.peek(1) or ""):
            self.take()
            name += "::" + self.take()
        return name

    # Statements

    def program(self):
        statements = []
        while self.peek() is not None:
            statements.append(self.statement())
        return ("block", statements)

    def block(self):
        self.take("{")
        statements = []
        while not self.accept("}"):
            statements.append(self.statement())
        return ("block", statements)

    def statement(self):
        token = self.peek()
        if token == "{":
            return self.block()
        if token == ";":
            self.take()
            return ("block", [])
        if token == "if":
            self.take()
            self.accept("constexpr")
            self.take("(")
            setup = self.declaration_or_expression()
            condition = setup
            if self.accept(";"):
                condition = self.expression()
            elif setup[0] == "declare":
                condition = ("name", setup[1][0][0])
            else:
                setup = ("block", [])
            self.take(")")
            then = self.statement()
            other = self.statement() if self.accept("else") else ("block", [])
            return ("if", setup, condition, then, other)
        if token == "for":
            return self.loop()
        if token == "while":
            self.take()
            self.take("(")
            self.expression()
            self.take(")")
            self.statement()
            return ("block", [])
        if token == "switch":
            self.take()
            self.take("(")
            subject = self.expression()
            self.take(")")
            self.take("{")
            parts, labels = [], []
            while not self.accept("}"):
                if self.accept("case"):
                    labels.append(self.expression(no_ternary=True))
                    self.take(":")
                    parts.append(("label", labels[-1]))
                elif self.peek() == "default" and self.peek(1) == ":":
                    self.take()
                    self.take()
                    parts.append(("default",))
                else:
                    parts.append(self.statement())
            return ("switch", subject, parts)
        if token == "return":
            self.take()
            value = None if self.peek() == ";" else self.expression()
            self.take(";")
            return ("return", value)
        if token in {"break", "continue"}:
            self.take()
            self.take(";")
            return (token,)
        if token == "try":
            self.take()
            tried = self.block()
            self.take("catch")
            while self.peek() != "{":
                self.take()
            self.brace_skip()
            return tried
        if token == "throw":
            self.take()
            self.expression()
            self.take(";")
            return ("throw",)
        if token in {"using", "template"}:
            while not self.accept(";"):
                self.take()
            return ("block", [])
        if token in {"struct", "enum"} and self.peek(2) == "{":
            while self.peek() != "{":
                self.take()
            self.brace_skip()
            self.accept(";")
            return ("block", [])
        statement = self.declaration_or_expression()
        if statement[0] == "name" and self.peek() != ";":
            # A macro without a semicolon.
            return statement
        self.take(";")
        return statement

    def brace_skip(self):
        depth = 0
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return

    def loop(self):
        self.take("for")
        self.take("(")
        start = self.at
        # for (type name : list)
        depth, place = 0, self.at
        while not (self.tokens[place] == ")" and depth == 0):
            depth += (self.tokens[place] in "([{") - (self.tokens[place] in ")]}")
            if self.tokens[place] == ":" and depth == 0:
                bound = [t for t in self.tokens[start:place] if re.match(r"[A-Za-z_]", t)]
                self.at = place + 1
                over = self.expression()
                self.take(")")
                names = bound[-1:] if self.tokens[place - 1] != "]" else None
                return ("each", names, over, self.statement())
            if self.tokens[place] == ";" and depth == 0:
                break
            place += 1
        first = self.statement()
        condition = ("literal", True) if self.peek() == ";" else self.expression()
        self.take(";")
        step = ("block", []) if self.peek() == ")" else self.expression()
        self.take(")")
        return ("for", first, condition, step, self.statement())

    def declaration_or_expression(self):
        start = self.at
        declared = self.declaration()
        if declared is not None:
            return declared
        self.at = start
        return self.expression()

    def declaration(self):
        while self.peek() in {"const", "static", "constexpr", "auto", "unsigned", "struct", "inline"}:
            self.take()
        qualified = self.tokens[self.at - 1] in {"auto", "unsigned"} if self.at else False
        if qualified:
            while self.peek() in {"const", "&", "&&", "*"}:
                self.take()
            if self.accept("["):
                bound = [self.take()]
                while self.accept(","):
                    bound.append(self.take())
                self.take("]")
                self.take("=")
                return ("bind", bound, self.expression())
            if not re.match(r"[A-Za-z_]", self.peek() or ""):
                return None
            if self.peek() in TYPES:
                self.take()
        else:
            if not re.match(r"[A-Za-z_]", self.peek() or ""):
                return None
            self.name()
            if self.peek() == "<" and not self.skip_angles():
                return None
            while self.peek() == "::":
                self.take()
                self.name()
            starred = False
            while self.peek() in {"const", "&", "*"}:
                starred = self.take() != "const" or starred
            if not re.match(r"[A-Za-z_]", self.peek() or ""):
                return None
            if starred and self.peek(1) not in {"=", ";", ",", "["}:
                return None
        declared = []
        while True:
            name = self.take()
            value = None
            if self.accept("["):
                size = self.expression() if self.peek() != "]" else None
                self.take("]")
                value = ("array", size)
                if self.accept("="):
                    value = self.expression()
            elif self.accept("="):
                value = self.expression()
            elif self.peek() == "{":
                value = self.initializer()
            elif self.peek() == "(":
                self.take()
                value = ("call", ("name", "constructor"), self.arguments(")"))
            elif self.peek() not in {";", ",", ")"}:
                return None
            declared.append((name, value))
            if not self.accept(","):
                break
            while self.peek() in {"*", "&"}:
                self.take()
        return ("declare", declared)

    # Expressions

    def arguments(self, closing):
        found = []
        while not self.accept(closing):
            found.append(self.expression())
            if not self.accept(","):
                self.take(closing)
                break
        return found

    def initializer(self):
        self.take("{")
        return ("list", self.arguments("}"))

    def expression(self, no_ternary=False):
        left = self.binary(0)
        if not no_ternary and self.accept("?"):
            then = self.expression()
            self.take(":")
            return ("ternary", left, then, self.expression())
        if self.peek() in ASSIGN:
            operator = self.take()
            return ("assign", operator, left, self.expression())
        return left

    def binary(self, level):
        if level == len(BINARY):
            return self.unary()
        left = self.binary(level + 1)
        while self.peek() in BINARY[level]:
            operator = self.take()
            left = ("binary", operator, left, self.binary(level + 1))
        return left

    def unary(self):
        token = self.peek()
        if token in {"!", "-", "+", "*", "&", "~", "++", "--"}:
            self.take()
            return ("unary", token, self.unary())
        if token == "new":
            self.take()
            return self.unary()
        if token == "(":
            inner = self.at + 1
            while self.tokens[inner] in TYPES | {"*"}:
                inner += 1
            if re.match(r"[A-Za-z_]", self.tokens[inner]) and self.tokens[inner + 1] == "*":
                inner += 2
                if self.tokens[inner] != ")":
                    inner = self.at + 1
            if inner > self.at + 1 and self.tokens[inner] == ")":
                kind = self.tokens[self.at + 1]
                self.at = inner + 1
                return ("cast", kind, self.unary())
        return self.postfix()

    def postfix(self):
        value = self.primary()
        while True:
            token = self.peek()
            if token == "(":
                self.take()
                value = ("call", value, self.arguments(")"))
            elif token == "[":
                self.take()
                value = ("index", value, self.expression())
                self.take("]")
            elif token in {".", "->"}:
                self.take()
                self.accept("template")
                value = ("member", value, self.take())
                if self.peek() == "<":
                    start = self.at
                    if not (self.skip_angles() and self.peek() == "("):
                        self.at = start
            elif token in {"++", "--"}:
                self.take()
                value = ("unary", token, value)
            elif token == "{" and value[0] == "name" and value[1] in {"std::make_pair"}:
                value = self.initializer()
            else:
                return value

    def primary(self):
        token = self.peek()
        if token is None:
            raise Unparsed("end of text")
        if token == "(":
            self.take()
            value = self.expression()
            self.take(")")
            return value
        if token == "{":
            return self.initializer()
        if token == "[":
            return self.lambda_()
        if re.match(r"[.\d]", token):
            return ("literal", number(self.take()))
        if token[0] in "\"'":
            text = self.take()[1:-1]
            while (self.peek() or "")[:1] == '"' or re.match("PRI[a-z]", self.peek() or ""):
                text += self.take().strip('"')
            return ("literal", text)
        if not re.match(r"[A-Za-z_]", token):
            raise Unparsed(f"{token!r} in an expression: {' '.join(self.tokens[self.at - 8:self.at + 8])}")
        name = self.name()
        if name in {"true", "false"}:
            return ("literal", name == "true")
        if name in {"nullptr", "NULL"}:
            return ("literal", None)
        if name in {"int", "float", "double", "bool", "size_t", "uint32_t", "int32_t", "int64_t"} and self.peek() == "(":
            self.take()
            value = self.expression()
            self.take(")")
            return ("cast", name, value)
        if self.peek() == "<":
            start = self.at
            if self.skip_angles() and self.peek() in {"(", "{", "::"}:
                arguments = self.tokens[start + 1 : self.at - 1]
                if name in CASTS:
                    self.take("(")
                    value = self.expression()
                    self.take(")")
                    return ("cast", arguments[-1], value)
                if self.peek() == "::":
                    self.take()
                    name += "::" + self.name()
                if name == "std::make_unique":
                    return ("name", "std::make_unique<" + "".join(arguments) + ">")
                return ("name", name)
            self.at = start
        return ("name", name)

    def lambda_(self):
        depth = 0
        while True:
            token = self.take()
            depth += (token == "[") - (token == "]")
            if depth == 0:
                break
        parameters = []
        if self.accept("("):
            part, depth = [], 0
            while True:
                token = self.take()
                if depth == 0 and token in {")", ","}:
                    names = [t for t in part if re.match(r"[A-Za-z_]", t)]
                    if names:
                        parameters.append(names[-1])
                    part = []
                    if token == ")":
                        break
                    continue
                depth += (token in "(<") - (token in ")>")
                part.append(token)
        while self.peek() != "{":
            self.take()
        return ("lambda", parameters, self.block())


def number(text):
    if text.startswith("0x"):
        return int(text.rstrip("uUlL"), 16)
    bare = text.rstrip("fFuUlL")
    if re.fullmatch(r"\d+", bare) and "f" not in text.lower():
        return int(bare)
    value = float(bare)
    return struct.unpack("f", struct.pack("f", value))[0] if text[-1] in "fF" else value


class Scope:
    def __init__(self, outer=None, names=None):
        self.outer, self.names = outer, names if names is not None else {}

    def find(self, name):
        scope = self
        while scope is not None:
            if name in scope.names:
                return scope
            scope = scope.outer
        return None

    def get(self, name):
        scope = self.find(name)
        return UNKNOWN if scope is None else scope.names[name]


class Fields:
    """An object: what is not there is `missing`."""

    def __init__(self, missing=UNKNOWN, **fields):
        object.__setattr__(self, "missing", missing)
        object.__setattr__(self, "fields", dict(fields))

    def __getattr__(self, name):
        return self.fields.get(name, self.missing)

    def __setattr__(self, name, value):
        self.fields[name] = value


class Reference:
    """Where a value is kept."""

    def __init__(self, read, write):
        self.read, self.write = read, write


class Interpreter:
    """`constants` gives names in capitals a value; those without one stand for themselves. `matters`
    finds the names for which a failed assertion counts."""

    def __init__(self, constants, matters):
        self.constants = constants
        self.matters = re.compile(matters)
        # Of the innermost loop over layers.
        self.layer = UNKNOWN

    def run(self, program, scope):
        try:
            self.do(program, scope)
        except Return as result:
            return result.value
        return None

    def do(self, node, scope):
        kind = node[0]
        if kind == "block":
            inner = Scope(scope)
            for statement in node[1]:
                self.do(statement, inner)
        elif kind == "declare":
            for name, value in node[1]:
                scope.names[name] = 0 if value is None else self.copy(self.value(value, scope))
                if value is None:
                    scope.names[name] = UNKNOWN
        elif kind == "bind":
            value = self.value(node[2], scope)
            parts = value if isinstance(value, (list, tuple)) else [UNKNOWN] * len(node[1])
            scope.names.update(zip(node[1], parts))
        elif kind == "if":
            inner = Scope(scope)
            if node[1][0] != "block" or node[1][1]:
                self.do(node[1], inner)
            condition = self.value(node[2], inner)
            if condition is UNKNOWN:
                self.branch(node[3], inner)
                self.branch(node[4], inner)
            elif condition and node[3] in (("throw",), ("block", [("throw",)])):
                self.refuse(node[2])
            else:
                self.do(node[3] if condition else node[4], inner)
        elif kind == "for":
            inner = Scope(scope)
            self.do(node[1], inner)
            for _ in range(100_000):
                condition = self.value(node[2], inner)
                if condition is UNKNOWN or not condition:
                    break
                if isinstance(inner.names.get("il"), int):
                    self.layer = inner.names["il"]
                try:
                    self.do(node[4], inner)
                except Break:
                    break
                except Continue:
                    pass
                self.do(node[3], inner)
        elif kind == "each":
            over = self.value(node[2], scope)
            for item in over if isinstance(over, list) and node[1] else []:
                try:
                    self.do(node[3], Scope(scope, {node[1][0]: item}))
                except Break:
                    break
                except Continue:
                    continue
        elif kind == "switch":
            self.switch(node, scope)
        elif kind == "return":
            raise Return(None if node[1] is None else self.value(node[1], scope))
        elif kind == "break":
            raise Break
        elif kind == "continue":
            raise Continue
        elif kind != "throw":
            self.value(node, scope)

    def refuse(self, condition):
        if self.matters.search(str(condition)):
            raise Refused

    def branch(self, node, scope):
        """One of two that may run: what ends it does not end the rest."""
        try:
            self.do(node, scope)
        except (Refused, Return, Break, Continue):
            pass

    def switch(self, node, scope):
        subject = self.value(node[1], scope)
        parts = node[2]
        def matches(part):
            return part[0] == "label" and self.value(part[1], scope) == subject
        start = next((i for i, part in enumerate(parts) if matches(part)), None)
        if start is None:
            start = next((i for i, part in enumerate(parts) if part[0] == "default"), len(parts))
        try:
            inner = Scope(scope)
            for part in parts[start:]:
                if part[0] not in {"label", "default"}:
                    self.do(part, inner)
        except Break:
            pass

    @staticmethod
    def copy(value):
        return list(value) if isinstance(value, list) else value

    def reference(self, node, scope):
        kind = node[0]
        if kind == "name":
            def write(value):
                (scope.find(node[1]) or scope).names[node[1]] = value
            return Reference(lambda: self.value(node, scope), write)
        if kind == "member":
            owner = self.value(node[1], scope)
            if isinstance(owner, Fields):
                return Reference(
                    lambda: getattr(owner, node[2]), lambda v: setattr(owner, node[2], v)
                )
        if kind == "index":
            owner, place = self.value(node[1], scope), self.value(node[2], scope)
            if isinstance(owner, list) and isinstance(place, int) and 0 <= place < len(owner):
                def put(value):
                    owner[place] = value
                return Reference(lambda: owner[place], put)
        if kind in {"unary", "cast"}:
            return self.reference(node[2], scope)
        return Reference(lambda: UNKNOWN, lambda value: None)

    def value(self, node, scope):
        kind = node[0]
        if kind == "literal":
            return node[1]
        if kind == "name":
            found = scope.find(node[1])
            if found is not None:
                return found.names[node[1]]
            if node[1] in self.constants:
                return self.constants[node[1]]
            if re.fullmatch(r"(\w+::)*[A-Z][A-Z0-9_a-z]*_\w*", node[1]):
                return re.sub(r"^GGML_ROPE_TYPE", "LLAMA_ROPE_TYPE", node[1])
            return UNKNOWN
        if kind == "array":
            size = self.value(node[1], scope) if node[1] else 0
            return [0] * size if isinstance(size, int) else UNKNOWN
        if kind == "list":
            return [self.value(item, scope) for item in node[1]]
        if kind == "cast":
            value = self.value(node[2], scope)
            if node[1] in {"float", "double"} and isinstance(value, (int, float)):
                return float(value)
            if node[1].startswith(("int", "uint", "size")) and isinstance(value, (float, bool)):
                return int(value)
            return value
        if kind == "ternary":
            condition = self.value(node[1], scope)
            if condition is UNKNOWN:
                then, other = self.value(node[2], scope), self.value(node[3], scope)
                return then if then == other else UNKNOWN
            return self.value(node[2] if condition else node[3], scope)
        if kind == "assign":
            target = self.reference(node[2], scope)
            value = self.copy(self.value(node[3], scope))
            if node[1] != "=":
                value = arithmetic(node[1][:-1], target.read(), value)
            target.write(value)
            return value
        if kind == "binary":
            return self.binary(node, scope)
        if kind == "unary":
            if node[1] in {"++", "--"}:
                target = self.reference(node[2], scope)
                value = arithmetic("+" if node[1] == "++" else "-", target.read(), 1)
                target.write(value)
                return value
            value = self.value(node[2], scope)
            if value is UNKNOWN or node[1] in {"*", "&", "+"}:
                return value
            if node[1] != "!" and not isinstance(value, (int, float)):
                return UNKNOWN
            return {"!": lambda: not value, "-": lambda: -value, "~": lambda: UNKNOWN}[node[1]]()
        if kind == "index":
            owner, place = self.value(node[1], scope), self.value(node[2], scope)
            if isinstance(owner, list) and isinstance(place, int) and place < len(owner):
                return owner[place]
            return UNKNOWN
        if kind == "member":
            owner = self.value(node[1], scope)
            if isinstance(owner, Fields):
                return getattr(owner, node[2])
            return UNKNOWN
        if kind == "lambda":
            def call(*values):
                return self.run(node[2], Scope(scope, dict(zip(node[1], values))))
            return call
        if kind == "call":
            return self.call(node, scope)
        raise Unparsed(kind)

    def binary(self, node, scope):
        operator = node[1]
        left = self.value(node[2], scope)
        if operator == "&&":
            if left is not UNKNOWN and not left:
                return False
            right = self.value(node[3], scope)
            if right is not UNKNOWN and not right:
                return False
            return UNKNOWN if UNKNOWN in (left, right) else True
        if operator == "||":
            if left is not UNKNOWN and left:
                return True
            right = self.value(node[3], scope)
            if right is not UNKNOWN and right:
                return True
            return UNKNOWN if UNKNOWN in (left, right) else False
        return arithmetic(operator, left, self.value(node[3], scope))

    def call(self, node, scope):
        function, arguments = node[1], node[2]
        if function[0] == "member":
            owner = self.value(function[1], scope)
            if isinstance(owner, list) and function[2] in {"begin", "end", "data"}:
                return owner
            if isinstance(owner, list) and function[2] == "size":
                return len(owner)
            found = getattr(owner, function[2]) if isinstance(owner, Fields) else UNKNOWN
        else:
            found = self.value(function, scope)
            if found is UNKNOWN or isinstance(found, str):
                found = BUILTIN.get(function[1], UNKNOWN) if function[0] == "name" else UNKNOWN
        if getattr(found, "with_nodes", False):
            return found(self, scope, arguments)
        values = [self.value(argument, scope) for argument in arguments]
        if function[0] == "name" and function[1].startswith("std::make_unique<"):
            return function[1][len("std::make_unique<") : -1]
        if function == ("name", "GGML_ASSERT"):
            if values[0] is not UNKNOWN and not values[0]:
                self.refuse(arguments[0])
            return None
        if callable(found):
            return found(*values)
        return UNKNOWN


def arithmetic(operator, left, right):
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    if operator == "==":
        return left == right
    if operator == "!=":
        return left != right
    if not all(isinstance(value, (int, float)) for value in (left, right)):
        return UNKNOWN
    if operator in {"/", "%"} and right == 0:
        return UNKNOWN
    if operator == "/" and isinstance(left, int) and isinstance(right, int):
        return left // right
    return {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "/": lambda: left / right,
        "%": lambda: left % right,
        "<": lambda: left < right,
        ">": lambda: left > right,
        "<=": lambda: left <= right,
        ">=": lambda: left >= right,
        "|": lambda: left | right,
        "&": lambda: left & right,
    }.get(operator, lambda: UNKNOWN)()


def fill(first, _, value):
    if isinstance(first, list):
        first[:] = [value] * len(first)


def copy_into(first, _, target):
    if isinstance(first, list) and isinstance(target, list):
        target[: len(first)] = first


def known(function):
    """Of unknown values the result is unknown."""
    def call(*values):
        if any(not isinstance(value, (int, float)) for value in values):
            return UNKNOWN
        return function(*values)
    return call


BUILTIN = {
    "constructor": lambda value=UNKNOWN, *rest: value,
    "std::fill": fill,
    "std::copy": copy_into,
    "std::begin": lambda value: value,
    "std::end": lambda value: value,
    "std::max": known(max),
    "std::min": known(min),
    "logf": known(math.log),
    "powf": known(math.pow),
    "sqrtf": known(math.sqrt),
    "std::sqrt": known(math.sqrt),
    "fabs": known(abs),
}
