"""What it adds to the configuration."""

CONTEXTS = {"reference": True}
FIELDS = ()


def faults(given):
    return []
