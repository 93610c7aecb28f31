"""Names as text: files and classes may be called anything."""


def escaped(name: object) -> str:
    """``name`` in one line: what does not print, such as line ends, marks of direction and undecodable bytes, as escape sequences."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in str(name))


def escaped_lines(text: str) -> str:
    """The same for each line of a text."""
    return "\n".join(map(escaped, text.split("\n")))


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
