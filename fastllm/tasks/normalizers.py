"""What of an answer is compared.

text is SQuAD's (Rajpurkar et al., 2016, evaluate-v1.1.py): lower case, ASCII punctuation, English
articles and extra space removed. number is GSM8K's (Cobbe et al., 2021): the number after ####.
"""

import re
import string
from decimal import Decimal

from fastllm.tasks.config import Normalizer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus counts as a sign only where nothing stands before it: 5-3 holds a 5 and a 3. Commas belong
# to a number only as they group thousands: 1,2,3 are three numbers.
_NUMBER = re.compile(r"(?:(?<![\w).])[-−])?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
                     r"(?:\.[0-9]+)?|\.[0-9]+)")


def normalize(text: str, normalizer: Normalizer) -> str:
    """The part of a text that is compared; for `number`, "" where the text holds no number."""
    if normalizer == "text":
        bare = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
        return " ".join(bare.split())
    if normalizer == "number":
        return last_number(text)
    return text.strip()


def last_number(text: str) -> str:
    """The last number, in its shortest spelling (1,200.50 -> 1200.5), "" where there is none.

    Where the text has ####, the number is looked for on the line that follows the first of them.
    """
    _, mark, after = text.partition("####")
    if mark:
        text = after.strip().partition("\n")[0]
    found = list(_NUMBER.finditer(text))
    if not found:
        return ""
    digits = found[-1].group(1).replace(",", "")
    whole = format(Decimal(digits), "f")
    short = (whole.rstrip("0").rstrip(".") if "." in whole else whole.lstrip("0")) or "0"
    return f"-{short}" if found[-1].group()[0] in "-−" and short != "0" else short
