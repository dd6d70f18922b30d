"""Phrases to avoid in documentation, docstrings and messages, and what to write instead."""

import re

PHRASES = {
    # regular expression of whole words: what to write instead
    r"equal to the uninterrupted one's": "bit-identical to that of an uninterrupted run",
    r"to the last bit": "bit-identical",
    r"goes? on where": "rerun the same command to resume",
    r"clock that stands still": "the ramp pauses",
    r"so many times": "`perplexity_ratio` x the best so far",
    r"(is|are) (allowed and )?warned of": "prints a warning",
    r"What a day of": "How a sample is shortened",
    r"(train|are|is|look|count|treated) alike": "identical",
    r"loss that weighs nothing": "the loss multiplied by zero",
    r"amid the": "mid-warmup",
    r"but the very": "except",
    r"tell(s|ing)?|told": "reports, lists, warns; message",
    r"(go|goes|went|going) on": "continue, resume",
    r"mend(s|ed|ing)?": "fix",
    r"stands? for": "is, means",
    r"becomes of": "how ... is ...",
    r"asks? for": "requires, selects, sets",
    r"beg[iau]n(s|ning)? with": "starts with",
    r"nothing else": "only",
    r"no other": "only",
    r"no step of a": "not at any step",
    r"in silence": "silently",
    r"anew": "again",
    r"come to be": "become",
    r"lies? (beside|in|at|under|there|on)": "is in, is stored in",
    r"has to do with": "depends on",
    r"hence|whence|thereof|therein|lest": "so, from it",
    r"at (the|its) worst": "at most",
    r"comes? to nothing": "has no effect",
}
_UNITS = "step|row|node|second|document|plot|length|sample|batch|page|task|token|rank|corpus|epoch|line|group|device"
_COUNTED = (
    "tokens|rows|samples|ranks|steps|records?|lines?|PNG|files?|sequences?|bytes|processes|documents|seconds|times"
)
PATTERNS = {
    rf"\b({_COUNTED}) an? ({_UNITS})\b(?! of)": "one record per step",
    r"(?<!there )\b(is|are) no (?!longer\b|more\b|less\b|fewer\b|better\b)\w+": "is not a ...",
    r"; [^;.:]{12,}; [^;.:]{12,}; ": "one fact per sentence, or a list",
}
"""Regular expressions, without regard to case."""

FIRST_WORDS = {"Of", "What", "Whether", "Those", "Which", "Where", "As", "From", "In", "By", "For"}
"""A docstring starts with a verb ("Return ...") or a noun, not with one of these."""

_COMPILED = {re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE): advice for phrase, advice in PHRASES.items()}
_COMPILED |= {re.compile(pattern, re.IGNORECASE): advice for pattern, advice in PATTERNS.items()}


def awkward_words(text: str) -> list[str]:
    """Return one line per awkward phrase in ``text``: the phrase, and what to write instead."""
    flat = " ".join(text.split())
    matches = ((match.group(), advice) for pattern, advice in _COMPILED.items() for match in pattern.finditer(flat))
    return [f"{phrase!r}: write {advice!r}" for phrase, advice in matches]
