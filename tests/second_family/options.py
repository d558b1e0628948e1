"""What it adds to the configuration."""

CONTEXTS = {"reference": True}
EDITING = ()
FIELDS = ()


def faults(given):
    return []
