"""Digits and symbols as they are said: numbers, years, ordinals, money, times, units.

Used by text.py: for what is spoken, and for transcripts before they are scored. The words of single numbers come from
num2words; which kind of number it is, is decided here. English only.
"""

import re

SYMBOLS = {
    "&": " and ",
    "%": " percent ",
    "+": " plus ",
    "=": " equals ",
    "@": " at ",
    "°": " degrees ",
    "×": " times ",
}
CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny"), "¥": ("yen", "")}
UNCHANGED_PLURALS = ("yen", "hertz", "kilohertz", "megahertz", "gigahertz")
PLURALS = {"foot": "feet", "inch": "inches", "penny": "pence"}
LARGE = "hundred|thousand|million|billion|trillion"
UNITS = {
    "km/h": "kilometer per hour",
    "m/s": "meter per second",
    "mph": "mile per hour",
    "km2": "square kilometer",
    "m2": "square meter",
    "km": "kilometer",
    "cm": "centimeter",
    "mm": "millimeter",
    "m": "meter",
    "ft": "foot",
    "mi": "mile",
    "kg": "kilogram",
    "mg": "milligram",
    "g": "gram",
    "lbs": "pound",
    "lb": "pound",
    "oz": "ounce",
    "ml": "milliliter",
    "L": "liter",
    "hrs": "hour",
    "hr": "hour",
    "min": "minute",
    "sec": "second",
    "ms": "millisecond",
    "kHz": "kilohertz",
    "MHz": "megahertz",
    "GHz": "gigahertz",
    "Hz": "hertz",
    "KB": "kilobyte",
    "MB": "megabyte",
    "GB": "gigabyte",
    "TB": "terabyte",
    "°C": "degree Celsius",
    "°F": "degree Fahrenheit",
}
DENOMINATORS = {2: "half", 4: "quarter"}

NUMBER = r"\d+(?:\.\d+)?"
MONEY = re.compile(rf"([{''.join(CURRENCIES)}])\s?({NUMBER})(?:\s?({LARGE})\b)?")
MEASURE = re.compile(rf"(?<![\w.])({NUMBER})\s?({'|'.join(map(re.escape, UNITS))})(?![\w/])")
TIME = re.compile(r"\b(\d{1,2}):([0-5]\d)\b")
RANGE = re.compile(rf"(?<![\w.-])({NUMBER})\s?[-–—]\s?({NUMBER})(?![\w-])")


def spell_numbers(text: str) -> str:
    """Write digits as English words, the most telling context first.

    >>> spell_numbers("In 1969, 2.5% of it cost $5.50 at 20 °C")
    'In nineteen sixty-nine, two point five percent of it cost five dollars and fifty cents at twenty degrees Celsius'
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("⁄", "/"))
    text = MONEY.sub(amount, text)
    text = re.sub(r"(?<=\d)\s*\*\s*(?=\d)", " × ", text)
    text = TIME.sub(time_of_day, text)
    text = re.sub(r"(?<=\d)\s?([ap])\.?m\b", r" \1 m", text, flags=re.IGNORECASE)
    text = re.sub(r"(?:\b[Nn]o\.\s?|#)(?=\d)", "number ", text)
    text = re.sub(r"\b(World War) (I{1,2})\b", lambda m: f"{m[1]} {'one' if m[2] == 'I' else 'two'}", text)
    text = re.sub(r"(?<![\w-])\d{3}-\d{4}(?!\w)", lambda m: " ".join(m[0].replace("-", ",")), text)
    text = RANGE.sub(r"\1 to \2", text)
    text = re.sub(r"(?<![\w.])[-−](?=\d)", "minus ", text)
    text = re.sub(r"(?<![\d/.])(\d{1,2})/(\d{1,2})(?![\d/])", fraction, text)
    text = re.sub(r"(\d+)(st|nd|rd|th)\b", lambda m: spoken(m[1], "ordinal"), text, flags=re.IGNORECASE)
    text = re.sub(r"\b(\d{2,4})'?s\b", lambda m: decade(m[1]), text)
    text = MEASURE.sub(measure, text)
    text = re.sub(r"(?<![\d.])(1[1-9]|20)\d\d(?![\d]|\.\d)", lambda m: spoken(m[0], "year"), text)
    text = re.sub(NUMBER, lambda m: f" {spoken(m[0], 'cardinal')} ", text)
    for symbol, word in SYMBOLS.items():
        text = text.replace(symbol, word)
    return re.sub(r" +([.,;:!?])", r"\1", re.sub(r" {2,}", " ", text)).strip(" ")


def amount(match: re.Match) -> str:
    """Money: "$5.50" -> "5 dollars and 50 cents", "$3 million" -> "3 million dollars"."""
    (whole, part), (number, large) = CURRENCIES[match[1]], match.group(2, 3)
    if large:
        return f"{number} {large} {plural(whole)}"
    units, _, parts = number.partition(".")
    if len(parts) != 2 or not part:
        return f"{number} {counted(number, whole)}"
    said = [f"{int(units)} {counted(units, whole)}"] if int(units) else []
    said += [f"{int(parts)} {counted(parts, part)}"] if int(parts) else []
    return " and ".join(said) or f"0 {plural(whole)}"


def measure(match: re.Match) -> str:
    """A number with its unit: "1 kg" -> "1 kilogram", "5 km/h" -> "5 kilometers per hour"."""
    return f"{match[1]} {counted(match[1], UNITS[match[2]])}"


def time_of_day(match: re.Match) -> str:
    """ "3:00" -> "3", "3:05" -> "3 oh 5", "3:15" -> "3 15"."""
    hour, minute = match.groups()
    return hour if minute == "00" else f"{hour} oh {minute[1]}" if minute[0] == "0" else f"{hour} {minute}"


def fraction(match: re.Match) -> str:
    """ "3/4" -> "3 quarters"; what is no proper fraction of small numbers ("24/7") stays."""
    upper, lower = int(match[1]), int(match[2])
    if not 0 < upper < lower <= 20:
        return match[0]
    part = DENOMINATORS.get(lower) or spoken(str(lower), "ordinal")
    return f"{upper} {part if upper == 1 else part + 's'}"


def counted(number: str, unit: str) -> str:
    """The unit as it stands behind a number.

    >>> counted("1", "foot"), counted("2", "mile per hour"), counted("3", "square meter")
    ('foot', 'miles per hour', 'square meters')
    """
    return unit if number in ("1", "01") else plural(unit)


def plural(unit: str) -> str:
    head, per, rest = unit.partition(" per ")
    adjective, space, noun = head.rpartition(" ")
    if head.startswith("degree"):
        return head.replace("degree", "degrees")
    noun = noun if noun in UNCHANGED_PLURALS else PLURALS.get(noun, noun + "s")
    return adjective + space + noun + per + rest


def spoken(digits: str, form: str) -> str:
    """One number in words; codes (leading zero) and very long numbers are read digit by digit."""
    from num2words import num2words

    if len(digits) > 15 or (len(digits) > 1 and digits[0] == "0" and digits[1] != "."):
        return " ".join(num2words(int(digit)) for digit in digits if digit != ".")
    return num2words(digits if "." in digits else int(digits), to=form).replace(",", "")


def decade(digits: str) -> str:
    """ "1990" of "1990s" -> "nineteen nineties"."""
    words = spoken(digits, "year" if len(digits) == 4 else "cardinal")
    return words[:-1] + "ies" if words.endswith("y") else words + "s"
