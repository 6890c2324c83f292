"""Calls between the process that runs an answer and the process that runs its tests, over two pipes.

Plain data is copied: it is written as JSON with tags and never unpickled. Any other object stays where it is and is
named by a number. A container that is passed as an argument gets back what the call made of it, so that functions which
change their arguments can be tested. Imports nothing but the standard library, for it runs in the sandbox.
"""

from __future__ import annotations

import builtins
import contextlib
import datetime
import importlib
import io
import json
import operator
import os
import struct
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST_BYTES = 2**24
"""Maximum bytes of one message."""
MOST_PRINTED = 2**16
"""Maximum characters of a call's output that the tests can read."""
MOST_DESCRIBED = 300
"""Maximum characters of a problem in a report."""
LARGE_INT = 2**53
PLAIN_TEXTS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "decimal": (Decimal, str, Decimal),
    "fraction": (Fraction, str, Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}
"""Immutable values that are sent as text: tag → (type, function to text, function from text)."""


PLAIN_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (list, dict, set, deque, bytearray, tuple, frozenset, bytes, str, int, float, complex)
}
"""Name of a plain type → the type. Its instances are copied; instances of subclasses stay in their process."""
PASSABLE_TYPES = (*PLAIN_KINDS.values(), bool, object, range, slice, type(None))
"""Built-in types that the answer may pass to a test, besides exceptions."""


class ConnectionEnded(Exception):
    """The error that the other process has ended or sent an invalid message."""


class NotPassable(TypeError):
    """The error for a value that cannot be sent to the other process."""


def get_plain_kind(value: Any) -> str:
    """Return the name of the plain type that a value is an instance of, such as `list`, or "" if it is of none."""
    return next((name for name, kind in PLAIN_KINDS.items() if isinstance(value, kind)), "")


class Containers:
    """The mutable containers of one call, such as lists and dicts, with the same numbers in both processes."""

    def __init__(self) -> None:
        self.by_number: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.before: dict[int, Any] = {}

    def add(self, container: Any, number: int | None = None) -> int:
        number = len(self.by_number) if number is None else number
        self.by_number[number] = container
        self.numbers[id(container)] = number
        return number

    def remember_contents(self) -> None:
        """Save each container's contents before a call, so that `list_changed` finds the containers that it changes."""
        self.before = {number: list_contents(container) for number, container in self.by_number.items()}

    def list_changed(self) -> list[int]:
        """Return the numbers of the containers whose contents, or their order, changed since `remember_contents`.

        Contents are compared by identity.
        """
        changed = []
        for number, before in self.before.items():
            after = list_contents(self.by_number[number])
            if len(before) != len(after) or any(old is not new for old, new in zip(before, after, strict=True)):
                changed.append(number)
        return changed


def list_contents(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [each for pair in dict.items(container) for each in pair]
    return list(container)


def describe_error(error: BaseException) -> str:
    """Return an exception's class and text, cut to 300 characters, or its class alone if its `__str__` fails."""
    try:
        return f"{type(error).__name__}: {error}"[:MOST_DESCRIBED]
    except BaseException:
        return type(error).__name__


class Peer:
    """One end of the connection of two processes: it sends calls to the other, serves the other's, and converts values.

    Attributes:
        copies_subclasses: whether an instance of a subclass of a plain type is sent as that type.
        shares_builtins: whether a function of Python's own, such as `sorted`, stays here when it is sent.
        shared: objects of this end that the other one may name.
        ended: why the other end can be asked nothing more; empty while it can.
        mixed: numbers of the other end's objects that an operator made with plain data, see `RemoteObject`.

    Args:
        reading, writing: file descriptors.
    """

    copies_subclasses: bool
    shares_builtins: bool

    def __init__(self, reading: int, writing: int) -> None:
        self.reading = reading
        self.writing = writing
        self.ended = ""
        self.shared: list[Any] = []
        self.shared_numbers: dict[int, int] = {}
        self.exception_classes: dict[int, type[BaseException]] = {}
        self.mixed: set[int] = set()

    # What the two ends do differently.

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Return the operations that the other process may request: name → function."""
        raise NotImplementedError

    def make_proxy(self, number: int, kind: str) -> Any:
        """Return a proxy in this process for an object of the other process."""
        raise NotImplementedError

    def find_proxy_number(self, value: Any) -> int | None:
        """Return the number of the object that a proxy stands for, or None if the value is no proxy."""
        raise NotImplementedError

    def is_shareable(self, value: Any) -> bool:
        """Return whether the other process may get a reference to a value."""
        raise NotImplementedError

    def check_request(self, message: Any) -> None:
        """Raise ConnectionEnded if the other end may not send the request `message`."""
        raise NotImplementedError

    def check_builtin(self, value: Any) -> None:
        """Raise ConnectionEnded if the other end may not send a reference to this built-in object."""
        raise NotImplementedError

    # Messages. A side that waits for a response serves the other side's requests.

    def request(self, message: Any) -> Any:
        """Send a request to the other process and return its response, serving its own requests while waiting."""
        self.send({"request": message})
        return self.wait_for_response()

    def wait_for_response(self) -> Any:
        """Return the next response from the other process, and serve its requests until then.

        Raises ConnectionEnded if it ended or sent an invalid message.
        """
        while True:
            message = self.receive()
            if not isinstance(message, dict) or len(message) != 1:
                raise ConnectionEnded("it sent an invalid message")
            if "request" in message:
                self.send({"response": self.serve(message["request"])})
            elif "response" in message:
                return message["response"]
            else:
                raise ConnectionEnded("it sent an invalid message")

    def send(self, message: Any) -> None:
        content = json.dumps(message).encode()
        if len(content) > MOST_BYTES:
            raise NotPassable(f"a value of more than {MOST_BYTES >> 20} MB cannot be passed")
        unsent = memoryview(struct.pack("!I", len(content)) + content)
        try:
            while unsent:
                unsent = unsent[os.write(self.writing, unsent) :]
        except BrokenPipeError as error:
            raise ConnectionEnded("it ended the process") from error

    def receive(self) -> Any:
        size = struct.unpack("!I", self.read(4))[0]
        if size > MOST_BYTES:
            raise ConnectionEnded("it sent an invalid message")
        try:
            return json.loads(self.read(size))
        except (ValueError, RecursionError) as error:
            raise ConnectionEnded("it sent an invalid message") from error

    def read(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            piece = os.read(self.reading, min(size - len(content), 2**16))
            if not piece:
                raise ConnectionEnded("it ended the process")
            content += piece
        return content

    # Requests.

    def call_remote(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Run an operation in the other process, and return its result or raise its exception."""
        containers = Containers()
        message = {
            "operation": operation,
            "args": [self.encode(each, containers) for each in args],
            "kwargs": {name: self.encode(value, containers) for name, value in kwargs.items()},
        }
        try:
            return self.read_response(self.request(message), containers)
        except ConnectionEnded as error:
            self.ended = str(error)
            raise

    def read_response(self, response: Any, containers: Containers) -> Any:
        if not isinstance(response, dict):
            raise ConnectionEnded("it sent an invalid message")
        if printed := response.get("printed"):
            sys.stdout.write(str(printed)[:MOST_PRINTED])
        try:
            for number, contents in response["changed"]:
                self.replace_contents(containers.by_number[number], contents, containers)
            error = self.decode_error(response["error"]) if "error" in response else None
            value = None if error else self.decode(response["value"], containers)
        except (LookupError, TypeError, ValueError, AttributeError) as decode_error:
            raise ConnectionEnded("it sent an invalid message") from decode_error
        if error is not None:
            raise error
        return value

    def serve(self, message: Any) -> Any:
        """Run an operation that the other process requests, and return the response to send."""
        self.check_request(message)
        containers = Containers()
        printed = io.StringIO()
        standard = sys.stdout
        response: dict[str, Any]
        try:
            args = [self.decode(each, containers) for each in message["args"]]
            kwargs = {name: self.decode(value, containers) for name, value in message["kwargs"].items()}
            containers.remember_contents()
            sys.stdout = printed
            value = self.operations()[message["operation"]](*args, **kwargs)
            sys.stdout = standard
            changed = self.encode_changes(containers)
            response = {"value": self.encode(value, containers), "changed": changed}
            json.dumps(response)
        except ConnectionEnded:
            raise
        except BaseException as error:
            sys.stdout = standard
            response = {"error": self.encode_error(error), "changed": []}
            with contextlib.suppress(Exception):
                response["changed"] = self.encode_changes(containers)
        finally:
            sys.stdout = standard
        return {**response, "printed": printed.getvalue()[:MOST_PRINTED]}

    def encode_changes(self, containers: Containers) -> list[Any]:
        return [
            [number, self.encode_contents(containers.by_number[number], containers)]
            for number in containers.list_changed()
        ]

    # Values.

    def encode(self, value: Any, containers: Containers) -> Any:
        """Convert a value to JSON for the other process: a copy if it is plain data, else a reference by number.

        Raises NotPassable if it can be neither copied nor shared.
        """
        if (number := self.find_proxy_number(value)) is not None:
            return {"yours": number}
        if value is None or value is Ellipsis or value is NotImplemented:
            return None if value is None else {"builtin": repr(value)}
        if (array := self.encode_array(value)) is not None:
            return array
        if isinstance(value, bool):
            return value
        name = get_plain_kind(value)
        if name and (self.copies_subclasses or type(value) is PLAIN_KINDS[name]):
            return self.encode_plain(name, value, containers)
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
        if type(value) is slice:
            return {"slice": [self.encode(each, containers) for each in (value.start, value.stop, value.step)]}
        if type(value) is datetime.timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        for tag, (kind, write, _) in PLAIN_TEXTS.items():
            if type(value) is kind:
                return {tag: write(value)}
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return {"builtin": value.__name__}
        is_builtin = isinstance(value, types.BuiltinFunctionType) and getattr(builtins, value.__name__, None) is value
        if is_builtin and not self.shares_builtins:
            return {"builtin": value.__name__}
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            return {"module": value.__name__, **self.encode_shared(value)}
        return self.encode_shared(value)

    def encode_plain(self, name: str, value: Any, containers: Containers) -> Any:
        """Convert a value of the plain type called `name`, such as `list`, to JSON.

        An object of a subclass is converted as its base type. A container that was sent before becomes its number.
        """
        if name == "int":
            number = int(value)
            return number if abs(number) < LARGE_INT else {"int": hex(number)}
        if name == "float":
            return float(value)
        if name == "str":
            return str.__str__(value)
        if name == "bytes":
            return {"bytes": bytes(value).hex()}
        if name == "complex":
            return {"complex": [value.real, value.imag]}
        if name in ("tuple", "frozenset"):
            return {name: [self.encode(each, containers) for each in value]}
        if (earlier := containers.numbers.get(id(value))) is not None:
            return {"known": earlier}
        number = containers.add(value)
        return {name: self.encode_contents(value, containers), "number": number}

    def encode_contents(self, value: Any, containers: Containers) -> Any:
        if isinstance(value, bytearray):
            return bytes(value).hex()
        if isinstance(value, dict):
            return [[self.encode(key, containers), self.encode(each, containers)] for key, each in dict.items(value)]
        return [self.encode(each, containers) for each in value]

    def encode_array(self, value: Any) -> Any:
        """Convert a numeric numpy array or scalar to JSON: dtype, shape and bytes. Returns None for any other value."""
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
            return None
        if value.dtype.kind not in "biufc":
            return None
        return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}

    def encode_shared(self, value: Any) -> Any:
        if not self.is_shareable(value):
            raise NotPassable(f"a {type(value).__name__} cannot be passed to the program under test")
        number = self.shared_numbers.get(id(value))
        if number is None:
            self.shared.append(value)
            number = self.shared_numbers[id(value)] = len(self.shared) - 1
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": self.encode_exception_class(value)}
        return {
            "mine": number,
            "kind": "coroutine" if isinstance(value, types.CoroutineType) else get_plain_kind(value),
        }

    def encode_exception_class(self, kind: type[BaseException]) -> list[Any]:
        """Convert an exception class to JSON: numbers and names of the class and its bases up to a built-in base."""
        classes = []
        for each in kind.__mro__:
            if getattr(builtins, each.__name__, None) is each:
                return [classes, each.__name__]
            self.shared.append(each)  # keeps its id from being used again
            classes.append([self.shared_numbers.setdefault(id(each), len(self.shared) - 1), each.__name__])
        return [classes, "Exception"]

    def encode_error(self, error: BaseException) -> Any:
        """Convert an exception to JSON: its class, its text, and its arguments if all of them can be sent."""
        try:
            args = [self.encode(each, Containers()) for each in error.args]
            if len(json.dumps(args)) > MOST_PRINTED:
                raise NotPassable("too long")
        except BaseException:
            args = []
        try:
            text = str(error)[:MOST_DESCRIBED]
        except BaseException:
            text = ""
        return {"class": self.encode_exception_class(type(error)), "args": args, "text": text}

    def decode(self, data: Any, containers: Containers) -> Any:
        """Convert JSON from the other process to a value, or raise ConnectionEnded if it is invalid."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if not isinstance(data, dict) or not data:
            raise ConnectionEnded("it sent an invalid value")
        tag, content = next(iter(data.items()))
        try:
            return self.decode_tagged(tag, content, data, containers)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
            raise ConnectionEnded(f"it sent an invalid value ({type(error).__name__})") from error

    def decode_tagged(self, tag: str, content: Any, data: Mapping[str, Any], containers: Containers) -> Any:
        if tag == "known":
            return containers.by_number[content]
        if tag in ("list", "dict", "set", "deque", "bytearray"):
            value = getattr(builtins, tag, deque)()
            containers.add(value, data["number"])
            self.replace_contents(value, content, containers)
            return value
        if tag in ("tuple", "frozenset"):
            return getattr(builtins, tag)(self.decode(each, containers) for each in content)
        if tag == "int":
            return int(content, 16)
        if tag == "bytes":
            return bytes.fromhex(content)
        if tag in ("complex", "range"):
            return getattr(builtins, tag)(*content)
        if tag == "slice":
            return slice(*(self.decode(each, containers) for each in content))
        if tag == "timedelta":
            return datetime.timedelta(*content)
        if tag in PLAIN_TEXTS:
            return PLAIN_TEXTS[tag][2](content)
        if tag == "builtin":
            value = getattr(builtins, content)
            self.check_builtin(value)
            return value
        if tag == "array":
            import numpy

            kind, shape, items = content
            dtype = numpy.dtype(kind)
            if dtype.kind not in "biufc":
                raise ValueError(kind)
            value = numpy.frombuffer(bytes.fromhex(items), dtype).reshape(shape).copy()
            return value if value.shape else value[()]
        if tag == "module":
            # The tests' side takes its own module of this name, which the answer cannot have changed.
            if content in sys.stdlib_module_names or content == "numpy":
                return importlib.import_module(content)
            return self.make_proxy(int(data["mine"]), "")
        if tag == "yours":
            return self.shared[content]
        if tag == "exception":
            return self.copy_exception_class(*content)
        if tag == "mine":
            return self.make_proxy(int(content), str(data["kind"]))
        raise ConnectionEnded("it sent an invalid value")

    def replace_contents(self, container: Any, content: Any, containers: Containers) -> None:
        if isinstance(container, bytearray):
            container[:] = bytes.fromhex(content)
            return
        if isinstance(container, dict):
            pairs = [(self.decode(key, containers), self.decode(value, containers)) for key, value in content]
            container.clear()
            container.update(pairs)
            return
        values = [self.decode(each, containers) for each in content]
        container.clear()
        container.update(values) if isinstance(container, set) else container.extend(values)

    def decode_error(self, data: Any) -> BaseException:
        kind = self.copy_exception_class(*data["class"])
        args = [self.decode(each, Containers()) for each in data["args"]]
        try:
            return kind(*args)
        except Exception:
            error = kind.__new__(kind)
            error.args = (str(data["text"]),)
            return error

    def copy_exception_class(self, classes: Sequence[Any], builtin: str) -> type[BaseException]:
        """Return this process's copy of an exception class of the other process, which is created on first use.

        Args:
            classes: (number, name) of the class and its bases.
            builtin: name of the first built-in base.
        """
        kind = getattr(builtins, builtin, Exception)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        for number, name in reversed(classes):
            if number not in self.exception_classes:
                copy: Any = type(str(name), (kind,), {})
                self.exception_classes[number] = copy
            kind = self.exception_classes[number]
        return kind


# Operations on objects of the answer, by the names that the tests' side uses.

UNARY = ("neg", "pos", "abs", "invert")
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
ORDER = ("lt", "le", "gt", "ge")
OF_NUMBERS = (*UNARY, "round", "bool", "int", "float", "index")
"""Names of operations whose result a test compares as a number or takes as a truth value."""


def to_plain_value(value: Any) -> Any:
    """Convert an object to the plain type that its class extends, such as tuple, or raise TypeError if it has none."""
    name = get_plain_kind(value)
    if not name:
        raise TypeError(f"a {type(value).__name__} is no plain data")
    return str.__str__(value) if name == "str" else PLAIN_KINDS[name](value)


def run_coroutine(coroutine: Any) -> Any:
    import asyncio  # slow to import

    return asyncio.run(coroutine)


def build_reversed_operation(name: str) -> Callable[[Any, Any], Any]:
    return lambda value, other: getattr(operator, name)(other, value)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "await": run_coroutine,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "isinstance": isinstance,
    "issubclass": issubclass,
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager, *error: type(manager).__exit__(manager, *error),
    "eq": operator.eq,
    "plain": to_plain_value,
    **{name.__name__: name for name in (len, iter, next, bool, str, repr, hash, int, float, round, reversed)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "index", *UNARY, *BINARY, *ORDER)},
    **{f"r{name}": build_reversed_operation(name) for name in BINARY},
}


class AnswerPeer(Peer):
    """The connection's end in the answer's process, which runs every operation that the tests request."""

    copies_subclasses = False
    shares_builtins = True

    def __init__(self, reading: int, writing: int, module: types.ModuleType) -> None:
        super().__init__(reading, writing)
        self.names = module.__dict__

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        return {
            **OPERATIONS,
            "global": self.names.__getitem__,
            "set_global": self.names.__setitem__,
            "names": lambda: [name for name in self.names if not name.startswith("__")],
        }

    def make_proxy(self, number: int, kind: str) -> Any:
        return TestFunction(self, number)

    def find_proxy_number(self, value: Any) -> int | None:
        return value.number if type(value) is TestFunction else None

    def is_shareable(self, value: Any) -> bool:
        return True

    def check_request(self, message: Any) -> None:
        """Accept every request of the tests."""

    def check_builtin(self, value: Any) -> None:
        """Accept every built-in object from the tests."""


class TestFunction:
    """A proxy in the answer's process for a function or iterator of the tests, which it can only call or iterate."""

    __test__ = False

    def __init__(self, peer: Peer, number: int) -> None:
        self.peer = peer
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.peer.call_remote("call", self, *args, **kwargs)

    def __iter__(self) -> TestFunction:
        return self

    def __next__(self) -> Any:
        return self.peer.call_remote("next", self)


class TestsPeer(Peer):
    """The connection's end in the tests' process, whose functions the answer can call only if a test passes them."""

    __test__ = False
    copies_subclasses = True
    shares_builtins = False

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        return {"call": OPERATIONS["call"], "next": next}

    def make_proxy(self, number: int, kind: str) -> Any:
        if kind == "coroutine":
            return self.wait_for_coroutine(number)
        return RemoteObject(self, number, kind if kind in PLAIN_KINDS else "")

    async def wait_for_coroutine(self, number: int) -> Any:
        return self.call_remote("await", RemoteObject(self, number, ""))

    def find_proxy_number(self, value: Any) -> int | None:
        return object.__getattribute__(value, "_number") if type(value) is RemoteObject else None

    def is_shareable(self, value: Any) -> bool:
        return callable(value) or isinstance(value, Iterator)

    def check_request(self, message: Any) -> None:
        first = message.get("args", [None])[:1] if isinstance(message, dict) else []
        if not (first and isinstance(first[0], dict) and "yours" in first[0]):
            raise ConnectionEnded("it sent an invalid request")  # calls what a test passed to it, and nothing else

    def check_builtin(self, value: Any) -> None:
        is_exception = isinstance(value, type) and issubclass(value, BaseException)
        if not is_exception and value not in (*PASSABLE_TYPES, Ellipsis, NotImplemented):
            raise ConnectionEnded("it sent an invalid value")  # a function such as eval would run here


def get_peer(value: RemoteObject) -> Peer:
    return object.__getattribute__(value, "_peer")


class RemoteObject:
    """A proxy in the tests' process for an object of the answer, whose operations run in the answer's process.

    It never equals plain data, and has no order with it, so that an object which claims to equal everything passes no
    test. What an operator makes of it and plain data has no plain value either: `abs(f(2) - 3) < 0.1` would otherwise
    hold for an object that is its own difference and whose absolute value is 0. An object whose class extends a plain
    type, such as a named tuple, is compared by what it holds as that type; the comparison is made here. Objects of the
    answer are compared with each other by the answer.
    """

    __slots__ = ("_kind", "_number", "_peer")

    def __init__(self, peer: Peer, number: int, kind: str) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return PLAIN_KINDS.get(object.__getattribute__(self, "_kind"), RemoteObject)
        return get_peer(self).call_remote("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        get_peer(self).call_remote("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        get_peer(self).call_remote("delattr", self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return get_peer(self).call_remote("call", self, *args, **kwargs)

    def __eq__(self, other: object) -> Any:
        if type(other) is not RemoteObject:
            return fetch_plain_value(self) == other if is_plain(self) else NotImplemented
        return get_object_number(self) == get_object_number(other) or bool(
            get_peer(self).call_remote("eq", self, other)
        )

    def __contains__(self, value: Any) -> bool:
        if is_plain(self):
            return value in fetch_plain_value(self)
        return any(each is value or each == value for each in get_peer(self).call_remote("iter", self))

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is RemoteObject and bool(get_peer(self).call_remote("isinstance", value, self))

    def __subclasscheck__(self, value: Any) -> bool:
        return type(value) is RemoteObject and bool(get_peer(self).call_remote("issubclass", value, self))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return get_peer(self).call_remote("exit", self, kind, None if error is None else str(error), None)


def get_object_number(value: RemoteObject) -> int:
    return object.__getattribute__(value, "_number")


def is_plain(value: RemoteObject) -> bool:
    return bool(object.__getattribute__(value, "_kind"))


def fetch_plain_value(value: RemoteObject) -> Any:
    return get_peer(value).call_remote("plain", value)


def is_mixed(value: RemoteObject) -> bool:
    """Return whether this object is the result of an operator on one of the answer's objects and plain data."""
    return get_object_number(value) in get_peer(value).mixed


def build_remote_unary(name: str, result_type: type | None = None) -> Callable[..., Any]:
    """Return a special method for RemoteObject that runs a unary operation, such as `neg`, in the answer's process.

    Args:
        result_type: the type that Python requires of the result; None if any will do.
    """

    def method(self: RemoteObject, *args: Any) -> Any:
        value = get_peer(self).call_remote(name, self, *args)
        if result_type is not None and not isinstance(value, result_type):
            raise TypeError(f"{name} gave a {type(value).__name__}")
        if name in OF_NUMBERS and is_mixed(self):
            if type(value) is not RemoteObject:
                raise TypeError(f"an object that was created from plain data has no {name}")
            get_peer(self).mixed.add(get_object_number(value))
        return value

    return method


def build_remote_binary(name: str) -> Callable[..., Any]:
    """Return a special method for RemoteObject that runs a binary operator, such as `add` or `lt`.

    One of the answer's objects and plain data give another object, or an error: a plain result would be the
    object's own word on a comparison that the test means to make.
    """

    def method(self: RemoteObject, other: Any) -> Any:
        is_other_plain = type(other) is not RemoteObject
        if is_other_plain and is_plain(self):
            return OPERATIONS[name](fetch_plain_value(self), other)
        value = None if is_other_plain and name in ORDER else get_peer(self).call_remote(name, self, other)
        if is_other_plain and type(value) is not RemoteObject:
            raise TypeError(f"an object of the answer's own class and a {type(other).__name__} have no {name}")
        if type(value) is RemoteObject and (is_other_plain or is_mixed(self) or is_mixed(other)):
            get_peer(self).mixed.add(get_object_number(value))
        elif is_mixed(self) or (not is_other_plain and is_mixed(other)):
            raise TypeError(f"an object that was created from plain data has no {name}")
        return value

    return method


for _name in (*BINARY, *(f"r{each}" for each in BINARY)):
    setattr(RemoteObject, f"__{_name.rstrip('_')}__", build_remote_binary(_name))
for _name in ORDER:
    setattr(RemoteObject, f"__{_name}__", build_remote_binary(_name))
for _name in (*UNARY, "iter", "next", "getitem", "setitem", "delitem", "round", "reversed", "enter"):
    setattr(RemoteObject, f"__{_name}__", build_remote_unary(_name))
RESULTS = {"len": int, "bool": bool, "str": str, "repr": str, "hash": int, "int": int, "float": float, "index": int}
"""Operation → the type that Python requires of its result."""
for _name, _result in RESULTS.items():
    setattr(RemoteObject, f"__{_name}__", build_remote_unary(_name, _result))
