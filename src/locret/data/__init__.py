"""Training data: sources -> records -> samples of token ids, checked before they are used, in a repeatable order."""

from locret.data.check import TOO_LONG, DataReport, check_samples, judge
from locret.data.forms import FORMS, parse_record, render
from locret.data.order import Order, shuffled
from locret.data.sample import RecordError, Sample
from locret.data.sources import Samples, Source

__all__ = [
    "FORMS",
    "TOO_LONG",
    "DataReport",
    "Order",
    "RecordError",
    "Sample",
    "Samples",
    "Source",
    "check_samples",
    "judge",
    "parse_record",
    "render",
    "shuffled",
]
