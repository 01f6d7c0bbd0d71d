"""Credentials in addresses: they are used as given, and masked in all that is written or shown."""

import re
from typing import Any

MASK = "***"
PASSWORD = re.compile(r"(?<=://)[^\s/@:?#]*:(?!:|\d{1,5}(?:[/?#]|$))[^\s@]*@")  # one as typed may hold / and ?
USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#]*)@")
PARAMETERS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>?#]*)([?#])([^\s'\"<>]*)")
VALUE = re.compile(r"(?<==)[^&;#]+")
NO_SECRET = re.compile("(abfss?|wasbs?|s?ftp|ssh|hdfs)", re.IGNORECASE)  # a name before @ is a container's or a user's


def masked(value: Any) -> Any:
    """A text, or the texts in lists and mappings, without the credentials of the addresses in it.

    Of `https://user:KEY@host/file?sig=KEY` stays `https://***@host/file?sig=***`: users and passwords go, and the
    values of all parameters, of which nobody knows which are secret.
    """
    if isinstance(value, str):
        return _masked(value) if "://" in value else value
    if isinstance(value, dict):
        return {masked(key): masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(inner) for inner in value)
    return value


def _masked(text: str) -> str:
    text = PASSWORD.sub(f"{MASK}@", text)
    text = USER.sub(_without_user, text)
    return PARAMETERS.sub(_without_values, text)


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    return match[0] if NO_SECRET.fullmatch(scheme) and ":" not in user else f"{scheme}://{MASK}@"


def _without_values(match: re.Match[str]) -> str:
    address, mark, parameters = match.groups()
    if "=" in parameters:
        shown = VALUE.sub(MASK, parameters)
    elif mark == "?" and address.startswith("http"):  # elsewhere a ? is a pattern's
        shown = MASK if parameters else ""
    else:
        shown = parameters
    return f"{address}{mark}{shown}"


def moved_to_environment(values: Any, key: str = "BLT") -> tuple[Any, dict[str, str]]:
    """Settings for a file, whose texts with credentials are read from the environment, and what belongs there.

    Returns:
        The settings, with `${oc.env:NAME}` in place of these texts, and the texts by their names.
    """
    if isinstance(values, dict):
        inner = {name: moved_to_environment(value, f"{key}_{name}") for name, value in values.items()}
        moved = {name: text for _, found in inner.values() for name, text in found.items()}
        return {name: value for name, (value, _) in inner.items()}, moved
    if isinstance(values, list | tuple):
        numbered, moved = moved_to_environment({str(number): value for number, value in enumerate(values)}, key)
        return list(numbered.values()), moved
    if masked(values) == values:
        return values, {}
    name = re.sub(r"\W", "_", key).upper()
    return f"${{oc.env:{name}}}", {name: values}
